{# One row per impression: the features of author_engagement as known at its own T and K. #}
{{ impression_features('author_engagement') }}
