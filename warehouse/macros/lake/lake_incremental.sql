{# A model whose rows live in an Iceberg table and arrive by event time.

   A model with `meta.features_of` gives a spine; the plugin adds the features of that group.
   The model filters itself with `in_build_range('known_at')`; the build commits exactly that range, once, whatever its length:
   history in one commit, the live end in ticks. Config: `event_time` (default known_at), `partition_by` ({column: transform}).
   `--event-time-start/--event-time-end` rebuild a range of arrival, but leave no gap: what was never built, or with another
   definition, is built from the first event on. `--full-refresh`, or a changed definition, rebuilds all;
   a feature that changed its meaning under the same name is refused without that flag. #}
{% materialization lake_incremental, adapter='duckdb' %}
    {%- set target_relation = this.incorporate(type='view') -%}
    {%- set range = build_range() -%}
    {{ run_hooks(pre_hooks, inside_transaction=False) }}
    {% if range.is_empty %}
        {{ log('nothing to build: ' ~ this ~ ' is built until ' ~ range.start, info=False) }}
    {% else %}
        {% do adapter.store_relation('lake', target_relation, [], '', 'iceberg', {
            'sql': compiled_code,
            'features_of': config.get('meta', {}).get('features_of'),
            'event_time': config.get('event_time') or 'known_at',
            'partition_by': config.get('partition_by', {}),
            'definition': definition_of(model.unique_id),
            'start': range.start,
            'end': range.end,
            'full_refresh': flags.FULL_REFRESH,
        }) %}
    {% endif %}
    {% call statement('main') -%}
        select 1
    {%- endcall %}
    {% do persist_docs(target_relation, model) %}
    {{ run_hooks(post_hooks, inside_transaction=False) }}
    {{ return({'relations': [target_relation]}) }}
{% endmaterialization %}

{# The condition that keeps a model to the range under build. #}
{% macro in_build_range(column) -%}
    {%- set range = build_range() -%}
    {{ column }} >= timestamp with time zone '{{ range.start }}' and {{ column }} < timestamp with time zone '{{ range.end }}'
{%- endmacro %}

{# The half-open range [start, end) of event time that this invocation builds of the current model, on the grid of ticks.
   It ends at the last closed tick and never beyond what the models it reads are built to. #}
{% macro build_range() -%}
    {%- if not execute -%}
        {{ return({'start': '1970-01-01 00:00:00+00:00', 'end': '1970-01-01 00:00:00+00:00', 'is_empty': true}) }}
    {%- endif -%}
    {%- set inputs = ["'none'"] -%}
    {%- for unique_id in model.depends_on.nodes -%}
        {%- set node = graph.nodes.get(unique_id) -%}
        {%- if node and node.config.materialized == 'lake_incremental' -%}
            {%- do inputs.append("'" ~ node.schema ~ "." ~ node.alias ~ "'") -%}
        {%- endif -%}
    {%- endfor -%}
    {%- set from_flag = invocation_args_dict.get('event_time_start') -%}
    {%- set until_flag = invocation_args_dict.get('event_time_end') -%}
    {%- set found = run_query(
        "with mine as (select * from headrace.builds where name = '" ~ model.schema ~ "." ~ model.alias ~ "'), "
        ~ "closed as (select least((select closed_until from headrace.run), "
        ~ "(select min(built_until) from headrace.builds where name in (" ~ inputs | join(', ') ~ "))) as until), "
        ~ "bounds as (select "
        ~ ("timestamptz '" ~ from_flag ~ "'" if from_flag else
            "coalesce((select built_until from mine where " ~ ('false' if flags.FULL_REFRESH else "definition = '" ~ definition_of(model.unique_id) ~ "'")
            ~ "), timestamptz '1970-01-01 00:00:00+00')") ~ " as range_start, "
        ~ ("least(until, timestamptz '" ~ until_flag ~ "')" if until_flag else "until") ~ " as range_end from closed) "
        ~ "select cast(range_start as varchar), cast(greatest(range_start, range_end) as varchar), range_start >= range_end and exists (select 1 from mine where built_until is not null) from bounds"
    ).rows[0] -%}
    {{ return({'start': found[0], 'end': found[1], 'is_empty': found[2]}) }}
{%- endmacro %}

{# A hash of what a table means: its code, its declaration, the algebra, and the same of every table it reads. `known`: the hashes
   found so far of one question, by unique_id, since most tables are read by several. #}
{% macro definition_of(unique_id, known=none) -%}
    {%- set node = graph.nodes.get(unique_id) -%}
    {%- if not node -%}{{ return('') }}{%- endif -%}
    {%- set known = {'macros': macros_digest()} if known is none else known -%}
    {%- if unique_id not in known -%}
        {%- set declared = node.config.meta.get('features') -%}
        {%- set meaning = declared.items() | rejectattr(0, 'equalto', 'tests') | list if declared is mapping else declared -%}
        {%- set parts = [
            node.raw_code, tojson(meaning), tojson(node.config.meta.get('attributes')), tojson(node.config.get('partition_by')), known.macros
        ] -%}
        {%- for setting in ('grace_seconds', 'duplicate_memory_seconds', 'furthest_ahead_seconds', 'attribution_seconds', 'log_partitions') -%}
            {%- do parts.append(var(setting) | string) -%}
        {%- endfor -%}
        {%- for input in node.depends_on.nodes -%}
            {%- do parts.append(definition_of(input, known)) -%}
        {%- endfor -%}
        {%- do known.update({unique_id: local_md5(parts | join('|'))}) -%}
    {%- endif -%}
    {{ return(known[unique_id]) }}
{%- endmacro %}

{% macro macros_digest() -%}
    {{ return(run_query('select macros_digest from headrace.run').rows[0][0]) }}
{%- endmacro %}
