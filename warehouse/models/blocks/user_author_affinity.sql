{# 5-minute blocks. Declared in _blocks.yml. #}
-- depends_on: {{ ref('stg_engagements') }}
{{ feature_blocks('user_author_affinity') }}
