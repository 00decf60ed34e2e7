{# Point-in-time features: one row per row of `spine`, the values of design §4's equation at the row's own (t, T, K). DuckDB.

   spine    row_id (unique), the entity's keys, request_ts (t), feature_watermark (T), known_at (K of block features, most often T) and, for
            event-fresh measures, known_position (bigint[]: next offset per log partition) or null for `landed_at < t`
   blocks, hours, days   the group's rows of 5 minutes, 1 hour, 1 day
   events, shadowed, retractions   the staging model, its shadowed arrivals and the retractions (read only for event-fresh measures)

   Sums and counts of integers are differences of prefix sums over on-time rows (one ASOF join per window edge: plain equalities and
   one inequality, DuckDB has open faults with more), plus a join on late rows. A rebuilt row is a late one; from its tick on, the
   late rows that it replaces are left out and the on-time row that it replaces is taken off. What cannot be subtracted is combined
   over an exact cover of days, hours and 5-minute blocks. Where a session began is found from the 5-minute blocks of its last day
   that hold something of the measure's set; it is combined from them. Event-fresh measures add the head: known events that no block of tick T
   holds. A row of the spine that knows a retraction whose target the blocks of T still hold is *opened*: it takes all its events one
   by one, and none of its blocks. #}
{% macro point_in_time(features, spine, blocks, hours, days, events, shadowed, retractions) -%}
{%- set keys = features['keys'] -%}
{%- set families = [] -%}
{%- for name in ('tick', 'request', 'event') -%}
    {%- set measures = [] -%}
    {%- for measure in features['measures'] -%}
        {%- set family = 'event' if measure.freshness == 'event' else measure.anchor -%}
        {%- if family == name -%}{%- do measures.append(measure) -%}{%- endif -%}
    {%- endfor -%}
    {%- if measures -%}{%- do families.append({'name': name, 'measures': measures}) -%}{%- endif -%}
{%- endfor -%}
with spine as (
    select
        row_id,
        {%- for key in keys %}
        {{ key }},
        {%- endfor %}
        request_ts,
        feature_watermark,
        known_at,
        known_position,
        {{ floor_minutes('request_ts', 5) }} as request_tick
    from {{ with_calendar(features, spine, 'request_ts') }} as given
),

on_time as (
    select * from {{ blocks }}
    where known_at = block_start + {{ seconds(300) }}
),

late as (
    select * from (
{{ with_replacement(keys, blocks) }}
    ) as late_rows
    where known_at > block_start + {{ seconds(300) }}
    union all by name
    select
        {%- for key in keys %}
        on_time.{{ key }},
        {%- endfor %}
        on_time.block_start,
        replaced.replaced_at as known_at,
        {%- for measure in features['measures'] %}
        {%- if subtractable(measure) == 'yes' %}
        {%- for column in representation_columns(measure).split(',') %}
        -on_time.{{ column }} as {{ column }},
        {%- endfor %}
        {%- endif %}
        {%- endfor %}
    from on_time
    inner join (
{{ replacements(keys, blocks) }}
    ) as replaced
        on {% for key in keys %}on_time.{{ key }} = replaced.{{ key }} and {% endfor -%}
        on_time.block_start = replaced.block_start
        and on_time.known_at = replaced.known_at
),
{% for family in families %}
{{ family_reads(features, family, blocks, hours, days, events, shadowed, retractions) }}
{%- endfor %}

finalized as (
    select
        spine.row_id,
        {%- for family in families %}
        {%- set outer_last = loop.last %}
        {%- for measure in family.measures %}
        {%- set measure_last = loop.last %}
        {%- for window in measure.windows %}
        {{ finalized(measure, window, parts_of(family, measure, window).split(',')) }} as {{ measure.name }}_{{ window }}
            {{- ',' if not (outer_last and measure_last and loop.last) }}
        {%- endfor %}
        {%- endfor %}
        {%- endfor %}
    from spine
    {%- for family in families %}
    inner join {{ family.name }}_readers on spine.row_id = {{ family.name }}_readers.row_id
    {%- for part in part_names(family).split(',') %}
    {%- if family.name == 'event' and part not in ('event_prefixes', 'event_late', 'event_covers') %}
    left join {{ part }} on spine.row_id = {{ part }}.row_id
    {%- else %}
    left join {{ part }} on {{ family.name }}_readers.read_id = {{ part }}.read_id
    {%- endif %}
    {%- endfor %}
    {%- endfor %}
)

select
    row_id,
    {%- for measure in features['measures'] %}
    {%- for window in measure.windows %}
    {{ measure.name }}_{{ window }} as {{ features['entity'] }}_{{ measure.name }}_{{ window }},
    {%- endfor %}
    {%- endfor %}
    {%- for derived in features['derived'] %}
    {{ derived.sql }} as {{ features['entity'] }}_{{ derived.name }},
    {%- endfor %}
from finalized
{%- endmacro %}

{# The names of the CTEs that hold a family's parts, comma-separated. #}
{% macro part_names(family) -%}
    {%- set names = [] -%}
    {%- for measure in family.measures -%}
        {%- for window in measure.windows -%}
            {%- for name in parts_of(family, measure, window).split(',') -%}
                {%- if name not in names -%}{%- do names.append(name) -%}{%- endif -%}
            {%- endfor -%}
        {%- endfor -%}
    {%- endfor -%}
    {{- names | join(',') -}}
{%- endmacro %}

{# The CTEs that a feature's value is put together from, comma-separated. Those of the event family are by row of the spine, but for
   what its blocks alone say; all others are by read. #}
{% macro parts_of(family, measure, window) -%}
    {%- set names = [] -%}
    {%- if is_map(measure) == 'yes' -%}
        {%- do names.append(family.name ~ '_map_' ~ measure.name) -%}
    {%- elif is_session(window) == 'yes' -%}
        {%- do names.append(family.name ~ '_sessions') -%}
    {%- elif subtractable(measure) == 'yes' -%}
        {%- do names.append(family.name ~ '_prefixes') -%}
        {%- do names.append(family.name ~ '_late') -%}
    {%- else -%}
        {%- do names.append(family.name ~ '_covers') -%}
    {%- endif -%}
    {%- if family.name == 'event' and is_map(measure) == 'no' -%}{%- do names.append(family.name ~ '_head') -%}{%- endif -%}
    {{- names | join(',') -}}
{%- endmacro %}

{# 'yes' where windows are differences of prefix sums: exact types only (doubles are covered, never subtracted). #}
{% macro subtractable(measure) -%}
    {{- 'yes' if measure.aggregation in ('count', 'sum', 'avg') and measure.type == 'bigint' and not measure.bucket_by else 'no' -}}
{%- endmacro %}

{# The CTEs of one family: its distinct reads, then its parts. `anchor` is where windows hang: T, or floor_5m(t). #}
{% macro family_reads(features, family, blocks, hours, days, events, shadowed, retractions) -%}
{%- set name, keys = family.name, features['keys'] -%}
{%- set subtracted, covered, lasting, maps, edges, cover_windows = [], [], [], [], [], [] -%}
{%- for measure in family.measures -%}
    {%- if sessions_of(measure) -%}{%- do lasting.append(measure) -%}{%- endif -%}
    {%- if is_map(measure) == 'yes' -%}{%- do maps.append(measure) -%}{%- endif -%}
    {%- set windows = edges if subtractable(measure) == 'yes' else cover_windows -%}
    {%- if fixed_windows_of(measure) -%}
        {%- do (subtracted if subtractable(measure) == 'yes' else covered).append(measure) -%}
        {%- for window in fixed_windows_of(measure).split(',') -%}
            {%- if window not in windows -%}{%- do windows.append(window) -%}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor %}
{{ name }}_reads as (
    select
        row_number() over () as read_id,
        *,
        {%- for window in edges %}
        least(anchor - {{ seconds(window_seconds(window)) }}, upper_edge) as lower_{{ window }},
        {%- endfor %}
    from (
        select distinct
            {%- for key in keys %}
            {{ key }},
            {%- endfor %}
            feature_watermark,
            known_at,
            {{ 'feature_watermark' if name == 'tick' else 'request_tick' }} as anchor,
            {{ 'feature_watermark' if name == 'event' else 'least(feature_watermark, known_at)' }} as upper_edge,
            {{ 'feature_watermark' if name == 'event' else 'known_at' }} as blocks_known_at
        from spine
    ) as distinct_reads
),
{% if subtracted %}
{{ window_sums(name, keys, subtracted, edges) }}
{% endif %}
{%- if covered %}
{{ window_covers(name, keys, covered, cover_windows, blocks, hours, days) }}
{% if covered | rejectattr('name', 'in', maps | map(attribute='name') | list) | list %}
{{ name }}_covers as (
    select
        read_id,
        {%- for measure in covered %}
        {%- if is_map(measure) == 'no' %}
        {%- for window in fixed_windows_of(measure).split(',') %}
        {{ combined(measure, "look_back = '" ~ window ~ "'", '_' ~ window) }},
        {%- endfor %}
        {%- endif %}
        {%- endfor %}
    from {{ name }}_cover_rows
    group by read_id
),
{% endif %}
{%- endif %}
{%- if name == 'event' %}
{{ fresh_events(features, family, lasting, events, shadowed, retractions) }}
{% endif %}
{#- the read whose blocks a row of the spine takes; none where it is opened (not a condition of the joins: those would be nested loops) -#}
{{ name }}_readers as (
    select
        spine.row_id,
        {%- if name == 'event' %}
        case when event_opened.row_id is null then reads.read_id end as read_id
        {%- else %}
        reads.read_id
        {%- endif %}
    from spine
    inner join {{ name }}_reads as reads
        on {% for key in keys %}spine.{{ key }} is not distinct from reads.{{ key }} and {% endfor -%}
        spine.feature_watermark = reads.feature_watermark
        and spine.known_at = reads.known_at
        and {{ 'spine.feature_watermark' if name == 'tick' else 'spine.request_tick' }} = reads.anchor
    {%- if name == 'event' %}
    left join event_opened on spine.row_id = event_opened.row_id
    {%- endif %}
),
{%- if lasting %}
{{ sessions(name, keys, lasting, blocks) }}
{%- endif %}
{%- if name == 'event' and maps | length < family.measures | length %}
event_head as (
    select
        event_known.spine_row_id as row_id,
        {%- for measure in family.measures %}
        {%- if is_map(measure) == 'no' %}
        {%- for window in measure.windows %}
        {{ mapped(measure, 'event_known.event_ts >= ' ~ head_edge(measure, window), '_' ~ window) }},
        {%- endfor %}
        {%- endif %}
        {%- endfor %}
    from event_known
    {%- if lasting %}
    left join event_starts on event_known.spine_row_id = event_starts.row_id
    {%- endif %}
    group by event_known.spine_row_id
),
{% endif %}
{%- for measure in maps %}
{{ family_map(name, measure) }}
{%- endfor %}
{%- endmacro %}

{# The CTEs of one map of a family: its entries in blocks and head, one per entry, then the features. #}
{% macro family_map(name, measure) -%}
{%- set id = 'row_id' if name == 'event' else 'read_id' -%}
{%- set entries = [] -%}
{%- if fixed_windows_of(measure) -%}
    {%- set windows = "look_back in ('" ~ fixed_windows_of(measure).replace(',', "', '") ~ "')" -%}
    {%- set rows = name ~ '_cover_rows' -%}
    {%- if name == 'event' -%}
        {%- set rows = rows ~ ' as cover_rows inner join event_readers as readers on cover_rows.read_id = readers.read_id' -%}
    {%- endif -%}
    {%- do entries.append(stored_entries(measure, rows, id ~ ', look_back', windows)) -%}
{%- endif -%}
{%- for window in sessions_of(measure).split(',') if window -%}
    {%- set rows = name ~ '_session_rows as session_rows inner join ' ~ name ~ '_starts as starts on session_rows.' ~ id ~ ' = starts.' ~ id -%}
    {%- set items = 'session_rows.' ~ id ~ ", '" ~ window ~ "' as look_back" -%}
    {%- do entries.append(stored_entries(measure, rows, items, 'session_rows.block_start >= starts.' ~ measure.name ~ '_' ~ window)) -%}
{%- endfor %}
{%- if name == 'event' %}
event_entries_{{ measure.name }} as (
    select
        spine_row_id,
        request_tick,
        event_ts,
        {{ mapped_entry(measure) }}
    from event_known
    {%- if event_condition(measure) %}
    where {{ event_condition(measure) }}
    {%- endif %}
),
    {%- for window in measure.windows -%}
        {%- set of_head -%}
select
    event_known.spine_row_id as row_id,
    '{{ window }}' as look_back,
    event_known.entry,
    {%- for column in representation_columns(measure).split(',') %}
    event_known.{{ column }}{{ ',' if not loop.last }}
    {%- endfor %}
from event_entries_{{ measure.name }} as event_known
{%- if is_session(window) == 'yes' %}
inner join event_starts on event_known.spine_row_id = event_starts.row_id
{%- endif %}
where event_known.event_ts >= {{ head_edge(measure, window) }}
        {%- endset -%}
        {%- do entries.append(of_head) -%}
    {%- endfor %}
{%- endif %}

{{ name }}_known_{{ measure.name }} as (
{{ combined_entries(measure, entries | join('\nunion all by name\n'), id ~ ', look_back') }}
),

{{ name }}_map_{{ measure.name }} as (
{{ read_maps(measure, name ~ '_known_' ~ measure.name, id) }}
),
{%- endmacro %}
