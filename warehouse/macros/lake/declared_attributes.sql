{# What tables of the lake add to the events of the staging model (`meta.attributes`), as `attribute_ctes` reads it.

   On DuckDB it comes from the Python side, which has refused what is wrong with file and line. Elsewhere it is the model's own `meta`,
   and a table `lake.note_versions` is the model `note_versions` of that target. A staging model that uses it names what it reads:
   `-- depends_on: {{ source('lake', 'note_versions') }}` (on RisingWave `{{ ref('note_versions') }}`). #}
{% macro declared_attributes(model_name) -%}
    {%- if not execute -%}{{ return([]) }}{%- endif -%}
    {%- if target.type == 'duckdb' -%}
        {{ return(fromjson(run_query('select meta from headrace.attributes').rows[0][0])) }}
    {%- endif -%}
    {%- set found = [] -%}
    {%- for node in graph.nodes.values() if node.name == model_name and node.config.meta.attributes -%}
        {%- for entry in node.config.meta.attributes -%}
            {%- set columns = [] -%}
            {%- for pair in column_pairs(entry['columns']) -%}
                {%- do columns.append(dict(pair, type=node.columns[pair.name].data_type, is_carried=pair.name in staged_columns().split(','))) -%}
            {%- endfor -%}
            {%- do found.append({
                'relation': ref(entry['from'].split('.')[-1]),
                'keys': column_pairs(entry['keys']),
                'valid_from': entry['valid_from'],
                'available_at': entry.get('available_at') or entry['valid_from'],
                'columns': columns
            }) -%}
        {%- endfor -%}
    {%- endfor -%}
    {{ return(found) }}
{%- endmacro %}

{# A list of columns, or a mapping of the events' columns to the table's, as pairs {name, column}. #}
{% macro column_pairs(given) -%}
    {%- set pairs = [] -%}
    {%- for name in given -%}
        {%- do pairs.append({'name': name, 'column': given[name] if given is mapping else name}) -%}
    {%- endfor -%}
    {{ return(pairs) }}
{%- endmacro %}
