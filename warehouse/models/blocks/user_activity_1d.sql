{# Days, rolled up row by row from the hours. #}
{{ feature_roll_up('user_activity', ref('user_activity_1h'), 1440) }}
