{# The rows that cover each window exactly, days and hours inside it and 5-minute blocks at its ends: the CTE <name>_cover_rows. What
   cannot be subtracted is combined over them. DuckDB. #}
{% macro window_covers(name, keys, covered, cover_windows, blocks, hours, days) -%}
{{ name }}_ranges as (
    select
        *,
        {#- whole hours and days inside [lower_edge, upper_edge); empty where the first is not before the second -#}
        {%- for minutes, unit in ((60, 'hour'), (1440, 'day')) %}
        {{ floor_minutes('(lower_edge + ' ~ seconds(minutes * 60 - 300) ~ ')', minutes) }} as first_{{ unit }},
        {{ floor_minutes('upper_edge', minutes) }} as end_{{ unit }},
        {%- endfor %}
    from (
        {%- for window in cover_windows %}
        select
            read_id,
            {%- for key in keys %}
            {{ key }},
            {%- endfor %}
            '{{ window }}' as look_back,
            least(anchor - {{ seconds(window_seconds(window)) }}, upper_edge) as lower_edge,
            upper_edge,
            blocks_known_at
        from {{ name }}_reads
        {%- if not loop.last %}
        union all
        {%- endif %}
        {%- endfor %}
    ) as all_ranges
),

{{ name }}_cover_rows as (
    {%- for relation, first, inner in ((days, 'day', none), (hours, 'hour', 'day'), (blocks, none, 'hour')) %}
    select
        ranges.read_id,
        ranges.look_back,
        {%- for measure in covered %}
        {%- for column in representation_columns(measure).split(',') %}
        rows_of.{{ column }},
        {%- endfor %}
        {%- endfor %}
    from {{ name }}_ranges as ranges
    inner join (
{{ with_replacement(keys, relation) }}
    ) as rows_of
        on {% for key in keys %}ranges.{{ key }} = rows_of.{{ key }} and {% endfor -%}
        rows_of.known_at <= ranges.blocks_known_at
        and coalesce(rows_of.replaced_at > ranges.blocks_known_at, true)
        and rows_of.block_start >= {{ 'ranges.first_' ~ first if first else 'ranges.lower_edge' }}
        and rows_of.block_start < {{ 'ranges.end_' ~ first if first else 'ranges.upper_edge' }}
        {%- if inner %}
        and not (rows_of.block_start >= ranges.first_{{ inner }} and rows_of.block_start < ranges.end_{{ inner }})
        {%- endif %}
    {%- if not loop.last %}
    union all
    {%- endif %}
    {%- endfor %}
),
{%- endmacro %}
