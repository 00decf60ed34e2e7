{# Windows of exact sums and counts: the CTEs <name>_prefixes (differences of prefix sums over on-time rows, one ASOF join per edge)
   and <name>_late (the late rows of each window), by read. DuckDB. #}
{% macro window_sums(name, keys, subtracted, edges) -%}
{{ name }}_running as (
    select
        {%- for key in keys %}
        {{ key }},
        {%- endfor %}
        block_start,
        {%- for measure in subtracted %}
        {%- for column in representation_columns(measure).split(',') %}
        cast(sum({{ column }}) over (partition by {{ keys | join(', ') }} order by block_start) as bigint) as {{ column }},
        {%- endfor %}
        {%- endfor %}
    from on_time
),

{{ name }}_prefixes as (
    select
        reads.read_id,
        {%- for measure in subtracted %}
        {%- for window in fixed_windows_of(measure).split(',') %}
        {%- for column in representation_columns(measure).split(',') %}
        coalesce(at_upper.{{ column }}, 0) - coalesce(at_{{ window }}.{{ column }}, 0) as {{ column }}_{{ window }},
        {%- endfor %}
        {%- endfor %}
        {%- endfor %}
    from {{ name }}_reads as reads
    {%- for edge in ['upper'] + edges %}
    asof left join {{ name }}_running as at_{{ edge }}
        on {% for key in keys %}reads.{{ key }} = at_{{ edge }}.{{ key }} and {% endfor -%}
        reads.{{ 'upper_edge' if edge == 'upper' else 'lower_' ~ edge }} > at_{{ edge }}.block_start
    {%- endfor %}
),

{{ name }}_late as (
    select
        reads.read_id,
        {%- for measure in subtracted %}
        {%- for window in fixed_windows_of(measure).split(',') %}
        {{ combined(measure, 'late.block_start >= reads.lower_' ~ window, '_' ~ window) }},
        {%- endfor %}
        {%- endfor %}
    from {{ name }}_reads as reads
    inner join late
        on {% for key in keys %}reads.{{ key }} = late.{{ key }} and {% endfor -%}
        late.known_at <= reads.blocks_known_at
        and coalesce(late.replaced_at > reads.blocks_known_at, true)
        and late.block_start < reads.upper_edge
        and late.block_start >= least({% for window in edges %}reads.lower_{{ window }}{{ ', ' if not loop.last }}{% endfor %})
    group by reads.read_id
),
{%- endmacro %}
