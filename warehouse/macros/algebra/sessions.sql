{# Sessions of point-in-time reads. DuckDB. #}

{# The CTEs of a family's sessions: where each began, going back over the 5-minute blocks that hold something of its measure's set, and
   its blocks combined. Of fresh measures the head has such blocks too, so theirs are by row of the spine. #}
{% macro sessions(name, keys, measures, blocks) -%}
{%- set id = 'row_id' if name == 'event' else 'read_id' %}
{{ name }}_session_rows as (
    select
        {{ 'readers.row_id' if name == 'event' else 'reads.read_id' }},
        rows_of.block_start,
        {%- for measure in measures %}
        {%- for column in representation_columns(measure).split(',') %}
        rows_of.{{ column }},
        {%- endfor %}
        {%- endfor %}
    from {{ name }}_reads as reads
    {%- if name == 'event' %}
    inner join event_readers as readers on reads.read_id = readers.read_id
    {%- endif %}
    inner join (
{{ with_replacement(keys, blocks) }}
    ) as rows_of
        on {% for key in keys %}reads.{{ key }} = rows_of.{{ key }} and {% endfor -%}
        rows_of.known_at <= reads.blocks_known_at
        and coalesce(rows_of.replaced_at > reads.blocks_known_at, true)
        and rows_of.block_start >= reads.anchor - {{ seconds(86400) }}
        and rows_of.block_start < reads.upper_edge
),

{{ name }}_active as (
    {%- for measure in measures %}
    {%- set last = loop.last %}
    select
        {{ id }},
        '{{ measure.name }}' as measure,
        block_start
    from {{ name }}_session_rows
    where {{ is_not_empty(measure) }}
    {%- if name == 'event' %}
    union
    select
        spine_row_id as row_id,
        '{{ measure.name }}' as measure,
        block_start
    from event_known
    where {{ event_condition(measure, 'event_ts >= request_tick - ' ~ seconds(86400)) }}
    {%- endif %}
    {%- if not last %}
    union
    {%- endif %}
    {%- endfor %}
),

{{ name }}_gaps as (
    select
        active.{{ id }},
        active.measure,
        active.block_start,
        epoch_us(coalesce(
            lead(active.block_start) over (partition by active.{{ id }}, active.measure order by active.block_start),
            {{ 'spine.request_tick' if name == 'event' else 'reads.upper_edge' }}
        )) - epoch_us(active.block_start) - 300000000 as nothing_us
    from {{ name }}_active as active
    {%- if name == 'event' %}
    inner join spine on active.row_id = spine.row_id
    {%- else %}
    inner join {{ name }}_reads as reads on active.read_id = reads.read_id
    {%- endif %}
),

{{ name }}_starts as (
    select
        {{ id }},
        {%- for measure in measures %}
        {%- for window in sessions_of(measure).split(',') %}
        min(block_start) filter (where measure = '{{ measure.name }}' and block_start > coalesce(over_{{ window }}, timestamptz '-infinity')) as {{ measure.name }}_{{ window }},
        {%- endfor %}
        {%- endfor %}
    from (
        select
            *,
            {%- for window in all_sessions(measures).split(',') %}
            max(block_start) filter (where nothing_us >= {{ session_gap_seconds(window) }}000000) over (partition by {{ id }}, measure) as over_{{ window }},
            {%- endfor %}
        from {{ name }}_gaps
    ) as with_ends
    group by {{ id }}
),

{{ name }}_sessions as (
    select
        session_rows.{{ id }},
        {%- for measure in measures %}
        {%- if is_map(measure) == 'no' %}
        {%- for window in sessions_of(measure).split(',') %}
        {{ combined(measure, 'session_rows.block_start >= starts.' ~ measure.name ~ '_' ~ window, '_' ~ window) }},
        {%- endfor %}
        {%- endif %}
        {%- endfor %}
    from {{ name }}_session_rows as session_rows
    inner join {{ name }}_starts as starts on session_rows.{{ id }} = starts.{{ id }}
    group by session_rows.{{ id }}
),
{%- endmacro %}

{% macro all_sessions(measures) -%}
    {%- set found = [] -%}
    {%- for measure in measures -%}
        {%- for window in sessions_of(measure).split(',') -%}
            {%- if window not in found -%}{%- do found.append(window) -%}{%- endif -%}
        {%- endfor -%}
    {%- endfor -%}
    {{- found | join(',') -}}
{%- endmacro %}
