{# Returns the two counts where they differ. #}
{% test same_number_of_rows_as(model, other) %}
with counts as (
    select
        (select count(*) from {{ model }}) as num_rows,
        (select count(*) from {{ other }}) as num_other_rows
)

select * from counts
where num_rows <> num_other_rows
{% endtest %}
