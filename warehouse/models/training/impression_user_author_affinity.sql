{# One row per impression: the features of user_author_affinity as known at its own T and K. #}
{{ impression_features('user_author_affinity') }}
