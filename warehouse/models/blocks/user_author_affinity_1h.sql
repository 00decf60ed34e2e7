{# Hours, rolled up row by row from the 5-minute blocks. #}
{{ feature_roll_up('user_author_affinity', ref('user_author_affinity'), 60) }}
