{# One row per impression: the features of user_activity as known at its own T and K. #}
{{ impression_features('user_activity') }}
