{# Schemas are the lake's namespaces, as written: dbt would prefix them with the target schema. #}
{% macro generate_schema_name(custom_schema_name, node) -%}
    {{- custom_schema_name | trim if custom_schema_name else target.schema -}}
{%- endmacro %}
