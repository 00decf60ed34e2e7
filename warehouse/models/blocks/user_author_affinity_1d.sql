{# Days, rolled up row by row from the hours. #}
{{ feature_roll_up('user_author_affinity', ref('user_author_affinity_1h'), 1440) }}
