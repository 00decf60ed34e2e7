{# Days, rolled up row by row from the hours. #}
{{ feature_roll_up('note_engagement', ref('note_engagement_1h'), 1440) }}
