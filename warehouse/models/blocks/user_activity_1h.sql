{# Hours, rolled up row by row from the 5-minute blocks. #}
{{ feature_roll_up('user_activity', ref('user_activity'), 60) }}
