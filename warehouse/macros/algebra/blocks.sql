{# Bitemporal blocks: one row per (keys, block_start, known_at). A row is written once its tick is closed; a late event is a row of its
   own tick, never an edit. A row with `is_rebuilt` holds everything of its (keys, block_start) that stands at its known_at and takes
   the place of the rows before it: that is how a retraction reaches a block. Readers combine the rows with known_at <= K < replaced_at
   (`replacements`). #}

{# Events → 5-minute block rows. `features` is the declaration, `events` a relation with the columns of its staging model, `retracted`
   those of its rows that were retracted, with `retracted_at`; `condition` narrows the rows by their known_at. #}
{% macro block_rows(features, events, retracted, condition='') -%}
{%- set keys = features['keys'] -%}
with touched as (
    select distinct
        {%- for key in keys %}
        {{ key }},
        {%- endfor %}
        block_start,
        known_at
    from (
        select
            {%- for key in keys %}
            {{ key }},
            {%- endfor %}
            {{ floor_minutes('event_ts', 5) }} as block_start,
            retracted_at as known_at
        from {{ with_calendar(features, retracted, 'event_ts') }} as retracted_events
        where
            retracted_at > known_at
            {%- for key in keys %}
            and {{ key }} is not null
            {%- endfor %}
    ) as retracted_from
    {%- if condition %}
    where {{ condition }}
    {%- endif %}
),

{# an event that was retracted before it was known never counts; where its tick rebuilds the block, it counts there -#}
as_they_came as (
    select
        came.*,
        came.known_at as row_known_at,
        false as is_rebuilt,
        true as is_counted
    from (
        select
            *,
            {{ floor_minutes('event_ts', 5) }} as block_start
        from {{ with_calendar(features, events, 'event_ts') }} as staged_events
        where
            {%- for key in keys %}
            {{ 'and ' if not loop.first }}{{ key }} is not null
            {%- endfor %}
            {%- if condition %}
            and {{ condition }}
            {%- endif %}
    ) as came
    left join {{ retracted }} as retracted
        on
            came.log_partition = retracted.log_partition
            and came.log_offset = retracted.log_offset
    left join touched
        on
            {%- for key in keys %}
            came.{{ key }} = touched.{{ key }} and
            {%- endfor %}
            came.block_start = touched.block_start
            and came.known_at = touched.known_at
    where
        touched.known_at is null
        and (retracted.retracted_at is null or retracted.retracted_at > came.known_at)
),

{# the retracted ones stay in the group, uncounted, so that a block with nothing left has a row that says so -#}
whole as (
    select
        came.*,
        touched.known_at as row_known_at,
        true as is_rebuilt,
        coalesce(retracted.retracted_at > touched.known_at, true) as is_counted
    from touched
    inner join (
        select
            *,
            {{ floor_minutes('event_ts', 5) }} as block_start
        from {{ with_calendar(features, events, 'event_ts') }} as staged_events
    ) as came
        on
            {%- for key in keys %}
            touched.{{ key }} = came.{{ key }} and
            {%- endfor %}
            touched.block_start = came.block_start
            and touched.known_at >= came.known_at
    left join {{ retracted }} as retracted
        on
            came.log_partition = retracted.log_partition
            and came.log_offset = retracted.log_offset
),

placed as (
    select * from as_they_came
    union all
    select * from whole
)

{% set group = (keys + ['block_start', 'row_known_at', 'is_rebuilt']) | join(', ') -%}
{%- set maps = [] -%}
{%- for measure in features['measures'] -%}
    {%- if is_map(measure) == 'yes' and target.type == 'duckdb' -%}
        {%- set entries -%}
    select
        {{ group }},
        {{ mapped_entry(measure) }}
    from placed
    where {{ event_condition(measure, 'is_counted') }}
        {%- endset -%}
        {%- do maps.append((measure, entries)) -%}
    {%- endif -%}
{%- endfor -%}
{%- set plain -%}
select
    {%- for key in keys %}
    {{ key }},
    {%- endfor %}
    block_start,
    row_known_at{{ ' as known_at' if not maps }},
    is_rebuilt
    {%- for measure in features['measures'] %}
    {%- if is_map(measure) == 'no' or target.type != 'duckdb' %},
    {{ mapped(measure, 'is_counted') }}
    {%- endif %}
    {%- endfor %}
from placed
group by
    {%- for key in keys %}
    {{ key }},
    {%- endfor %}
    block_start,
    row_known_at,
    is_rebuilt
{%- endset -%}
{{ with_maps(features, plain, maps, group, 'row_known_at') if maps else plain }}
{%- endmacro %}

{# Rows with the plain measures of a group → rows with all of them: each map comes from its entries (`maps`: pairs of a measure and a
   select). `group` names the columns of a row, `known_at` the one of them that becomes known_at. DuckDB. #}
{% macro with_maps(features, plain, maps, group, known_at) -%}
select
    {%- for column in group.split(', ') %}
    plain_rows.{{ column }}{{ ' as known_at' if column == known_at and column != 'known_at' }},
    {%- endfor %}
    {%- for measure in features['measures'] %}
    {%- set last = loop.last %}
    {%- for column in representation_columns(measure).split(',') %}
    {%- if is_map(measure) == 'yes' %}
    coalesce({{ measure.name }}_maps.{{ column }}, []) as {{ column }}
    {%- else %}
    plain_rows.{{ column }}
    {%- endif %}{{ ',' if not (last and loop.last) }}
    {%- endfor %}
    {%- endfor %}
from (
{{ plain }}
) as plain_rows
{%- for measure, entries in maps %}
left join (
{{ stored_maps(measure, entries, group) }}
) as {{ measure.name }}_maps
    on
        {%- for column in group.split(', ') %}
        {{ 'and ' if not loop.first }}plain_rows.{{ column }} = {{ measure.name }}_maps.{{ column }}
        {%- endfor %}
{%- endfor %}
{%- endmacro %}

{# Block rows that a rebuilt one takes the place of, and from which tick on: keys, block_start, known_at, replaced_at. Few: only blocks
   that a retraction has touched. #}
{% macro replacements(keys, rows) -%}
select
    {%- for key in keys %}
    earlier.{{ key }},
    {%- endfor %}
    earlier.block_start,
    earlier.known_at,
    min(rebuilt.known_at) as replaced_at
from {{ rows }} as earlier
inner join {{ rows }} as rebuilt
    on
        {%- for key in keys %}
        earlier.{{ key }} = rebuilt.{{ key }} and
        {%- endfor %}
        earlier.block_start = rebuilt.block_start
        and earlier.known_at < rebuilt.known_at
where rebuilt.is_rebuilt
group by
    {%- for key in keys %}
    earlier.{{ key }},
    {%- endfor %}
    earlier.block_start,
    earlier.known_at
{%- endmacro %}

{# Block rows with `replaced_at`, null where the row stands for good. #}
{% macro with_replacement(keys, rows) -%}
select
    rows_of.*,
    replaced.replaced_at
from {{ rows }} as rows_of
left join (
{{ replacements(keys, rows) }}
) as replaced
    on
        {%- for key in keys %}
        rows_of.{{ key }} = replaced.{{ key }} and
        {%- endfor %}
        rows_of.block_start = replaced.block_start
        and rows_of.known_at = replaced.known_at
{%- endmacro %}

{# The block rows that stand at a tick: combined, they are everything known then. `tick` is a SQL expression. #}
{% macro standing_rows(features, rows, tick) -%}
select * exclude (replaced_at)
from (
{{ with_replacement(features['keys'], rows) }}
) as all_rows
where
    known_at <= {{ tick }}
    and coalesce(replaced_at > {{ tick }}, true)
{%- endmacro %}

{# Block rows → rows of `minutes`, row by row: known_at = greatest(the child's, the end of the parent). Where a child was rebuilt
   after the parent's end, so is the parent, whole, at that known_at. DuckDB. #}
{% macro rolled_up_rows(features, child, minutes, condition='') -%}
{%- set keys = features['keys'] -%}
{%- set parent_start = floor_minutes('block_start', minutes) -%}
{%- set parent_end = parent_start ~ ' + ' ~ seconds(minutes * 60) -%}
with touched as (
    select distinct
        {%- for key in keys %}
        {{ key }},
        {%- endfor %}
        {{ parent_start }} as parent_start,
        known_at
    from {{ child }}
    where
        is_rebuilt
        and known_at > {{ parent_end }}
        {%- if condition %}
        and {{ condition }}
        {%- endif %}
),

as_they_came as (
    select
        came.* exclude (replaced_at),
        false as is_rebuilt
    from (
        select *
        from (
            select
                * exclude (block_start, known_at, is_rebuilt),
                {{ parent_start }} as parent_start,
                greatest(known_at, {{ parent_end }}) as known_at
            from (
{{ with_replacement(keys, child) }}
            ) as children
        ) as parents_of_children
        {%- if condition %}
        where {{ condition }}
        {%- endif %}
    ) as came
    left join touched
        on
            {%- for key in keys %}
            came.{{ key }} = touched.{{ key }} and
            {%- endfor %}
            came.parent_start = touched.parent_start
            and came.known_at = touched.known_at
    where
        touched.known_at is null
        and (came.replaced_at is null or came.replaced_at > came.known_at)
),

whole as (
    select
        children.* exclude (block_start, known_at, is_rebuilt, replaced_at),
        touched.parent_start,
        touched.known_at,
        true as is_rebuilt
    from touched
    inner join (
{{ with_replacement(keys, child) }}
    ) as children
        on
            {%- for key in keys %}
            touched.{{ key }} = children.{{ key }} and
            {%- endfor %}
            touched.parent_start = {{ floor_minutes('children.block_start', minutes) }}
            and touched.known_at >= children.known_at
            and coalesce(touched.known_at < children.replaced_at, true)
),

placed as (
    select * from as_they_came
    union all by name
    select * from whole
)

{% set group = (keys + ['block_start', 'known_at', 'is_rebuilt']) | join(', ') -%}
{%- set maps = [] -%}
{%- for measure in features['measures'] -%}
    {%- if is_map(measure) == 'yes' -%}
        {%- set items = (keys + ['parent_start as block_start', 'known_at', 'is_rebuilt']) | join(', ') -%}
        {%- do maps.append((measure, stored_entries(measure, 'placed', items, ''))) -%}
    {%- endif -%}
{%- endfor -%}
{%- set plain -%}
select
    {%- for key in keys %}
    {{ key }},
    {%- endfor %}
    parent_start as block_start,
    known_at,
    is_rebuilt
    {%- for measure in features['measures'] %}
    {%- if is_map(measure) == 'no' %},
    {{ combined(measure) }}
    {%- endif %}
    {%- endfor %}
from placed
group by
    {%- for key in keys %}
    {{ key }},
    {%- endfor %}
    parent_start,
    known_at,
    is_rebuilt
{%- endset -%}
{{ with_maps(features, plain, maps, group, 'known_at') if maps else plain }}
{%- endmacro %}
