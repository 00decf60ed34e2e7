{# One row per impression: the features of note_engagement as known at its own T and K. #}
{{ impression_features('note_engagement') }}
