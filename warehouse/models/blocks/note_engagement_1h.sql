{# Hours, rolled up row by row from the 5-minute blocks. #}
{{ feature_roll_up('note_engagement', ref('note_engagement'), 60) }}
