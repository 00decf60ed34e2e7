{# The checked declaration of a feature group, by the name of its 5-minute block model.

   On DuckDB it comes from the Python side, which has refused what is wrong with file and line. Elsewhere (no connection while
   compiling) it is the model's own `meta`, with the defaults filled in. #}
{% macro feature_group(name) -%}
    {%- if not execute -%}{{ return({'entity': '', 'keys': ['key'], 'calendar': [], 'measures': [], 'derived': []}) }}{%- endif -%}
    {%- if target.type == 'duckdb' -%}
        {%- set found = run_query("select meta from headrace.feature_groups where name = '" ~ name ~ "'") -%}
        {%- if found.rows | length == 0 -%}
            {{ exceptions.raise_compiler_error("feature_group: no model " ~ name ~ " declares config.meta.features") }}
        {%- endif -%}
        {{ return(fromjson(found.rows[0][0])) }}
    {%- endif -%}
    {%- for node in graph.nodes.values() -%}
        {%- if node.name == name and node.config.meta.features -%}
            {%- set declared = node.config.meta.features -%}
            {%- set measures, keys, calendar = [], [], [] -%}
            {%- for measure in declared.measures -%}
                {%- do measures.append(with_defaults(measure)) -%}
            {%- endfor -%}
            {%- set fields = {'hour': 'hour', 'day_of_week': 'isodow', 'day_of_month': 'day', 'month': 'month'} -%}
            {%- for key in declared['keys'] -%}
                {%- do keys.append(key if key is string else key.name) -%}
                {%- if key is not string -%}{%- do calendar.append(dict(key, field=fields[key.part])) -%}{%- endif -%}
            {%- endfor -%}
            {{ return(dict(declared, keys=keys, calendar=calendar, measures=measures)) }}
        {%- endif -%}
    {%- endfor -%}
    {{ exceptions.raise_compiler_error("feature_group: no enabled model " ~ name ~ " declares config.meta.features") }}
{%- endmacro %}

{# A measure as it is declared, with the defaults filled in and windows by name: what the Python side hands out. #}
{% macro with_defaults(measure) -%}
    {%- set types = {
        'var': 'double', 'stddev': 'double', 'approx_quantile': 'double', 'first_n': 'varchar', 'last_n': 'varchar',
        'last_distinct_n': 'varchar', 'top_k': 'varchar', 'approx_count_distinct': 'varchar'
    } -%}
    {%- set windows = [] -%}
    {%- for window in measure.windows -%}{%- do windows.append(window if window is string else 'session_' ~ window.gap) -%}{%- endfor -%}
    {%- set defaults = {
        'where': none, 'of': none, 'type': types.get(measure.aggregation, 'bigint'), 'n': none, 'k': none, 'q': none,
        'relative_error': 0.01, 'bucket_by': none, 'empty': none
    } -%}
    {{ return(dict(defaults, **dict(measure, windows=windows))) }}
{%- endmacro %}

{# The 5-minute blocks of a group, by its declaration. #}
{% macro feature_blocks(group) -%}
    {%- set features = feature_group(group) -%}
    {{ block_rows(
        features,
        ref(features['events']) if execute else ref('stg_engagements'),
        ref('stg_retracted_events'),
        in_build_range('known_at')
    ) }}
{%- endmacro %}

{# Hours (60) or days (1440) of a group, from the rows of a finer granularity. #}
{% macro feature_roll_up(group, child, minutes) -%}
    {{ rolled_up_rows(feature_group(group), child, minutes, in_build_range('known_at')) }}
{%- endmacro %}

{# A group's features for each row of a spine, each at its own T and K. #}
{% macro features_at(group, spine) -%}
    {{ point_in_time(
        feature_group(group), spine, ref(group), ref(group ~ '_1h'), ref(group ~ '_1d'),
        ref('stg_engagements'), ref('stg_shadowed_arrivals'), ref('stg_retractions')
    ) }}
{%- endmacro %}

{# The features of a batch table (`kind: table`) for each row of a spine, each at its own t and K. `relation`: ref() or source() of the
   table that declares them. #}
{% macro features_of_table(name, spine, relation) -%}
    {{ table_features_at(feature_group(name) if execute else {'keys': ['key'], 'event_time': 'event_time', 'available_at': 'event_time', 'order': [], 'columns': []}, spine, relation) }}
{%- endmacro %}
