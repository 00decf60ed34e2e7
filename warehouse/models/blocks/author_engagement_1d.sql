{# Days, rolled up row by row from the hours. #}
{{ feature_roll_up('author_engagement', ref('author_engagement_1h'), 1440) }}
