{# Hours, rolled up row by row from the 5-minute blocks. #}
{{ feature_roll_up('author_engagement', ref('author_engagement'), 60) }}
