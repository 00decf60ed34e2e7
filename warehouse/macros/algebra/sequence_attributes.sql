{# A new attribute backfilled onto logged sequences: one row per row of `logged`, with a list as long as its sequence and in its
   order, NULL at items without a value. What was logged stays as it is: ids are facts, attributes may be joined at any time.

   logged: a relation with `row_key` (unique), `sequence` (a list of ids) and `as_of` (timestamptz). attributes: a relation with
   `item_key`, `attribute` and, where a value replaces an earlier one, `valid_from`: the newest at or before as_of counts (of two
   of one instant the larger), so that no value of the future gets in. Without valid_from an item has one value for all times (a version of an embedding, say).
   Runs on DuckDB and PostgreSQL. #}
{% macro sequence_attribute(logged, row_key, sequence, as_of, attributes, item_key, attribute, valid_from=none) -%}
with items as (
    select
        logged.{{ row_key }},
        logged.{{ as_of }},
        item.item_id,
        item.place
    from {{ logged }} as logged
    cross join lateral (
        select
            item_id,
            place
        from unnest(logged.{{ sequence }}) with ordinality as listed (item_id, place)
    ) as item
),

valued as (
    select
        items.{{ row_key }},
        items.place,
        attributes.{{ attribute }},
        row_number() over (
            partition by items.{{ row_key }}, items.place
            order by {{ 'attributes.' ~ valid_from ~ ' desc, ' if valid_from }}attributes.{{ attribute }} desc
        ) as newest
    from items
    left join {{ attributes }} as attributes
        on
            items.item_id = attributes.{{ item_key }}
            {%- if valid_from %}
            and attributes.{{ valid_from }} <= items.{{ as_of }}
            {%- endif %}
),

listed as (
    select
        {{ row_key }},
        array_agg({{ attribute }} order by place) as {{ attribute }}
    from valued
    where newest = 1
    group by {{ row_key }}
)

select
    logged.{{ row_key }},
    coalesce(listed.{{ attribute }}, {{ '[]' if target.type == 'duckdb' else "'{}'" }}) as {{ attribute }}
from {{ logged }} as logged
left join listed on logged.{{ row_key }} = listed.{{ row_key }}
{%- endmacro %}
