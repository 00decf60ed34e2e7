{# How long the views keep an arrival, as an interval: `stream_keep_days`. An event is in windows of at most 30 days from up to F
   before it landed, and what landed up to H before it decides whether it is a duplicate; lifetime windows need all there ever was. #}
{% macro kept_in_stream() -%}
    {%- set longest = namespace(days=0) -%}
    {%- set models = graph.nodes.values() if execute else [] -%}
    {%- for node in models if node.config.meta.features -%}
        {%- for measure in node.config.meta.features.measures | default([]) -%}
            {%- for window in measure.windows -%}
                {%- if window == 'lifetime' -%}
                    {{ exceptions.raise_compiler_error(
                        "stream_keep_days: " ~ node.name ~ "." ~ measure.name ~ " has a lifetime window, and the views keep "
                        ~ var('stream_keep_days') ~ " days: leave the window out, or read it from the lake"
                    ) }}
                {%- elif window is string and window.endswith('d') -%}
                    {%- set longest.days = [longest.days, window[:-1] | int] | max -%}
                {%- endif -%}
            {%- endfor -%}
        {%- endfor -%}
    {%- endfor -%}
    {%- set least = longest.days + var('duplicate_memory_seconds') // 86400 + 1 -%}
    {%- if var('stream_keep_days') < least -%}
        {{ exceptions.raise_compiler_error(
            "stream_keep_days: must be at least " ~ least ~ " (the longest window, " ~ longest.days
            ~ " days, the duplicate memory and a day), got " ~ var('stream_keep_days')
        ) }}
    {%- endif -%}
    interval '{{ var('stream_keep_days') }} days'
{%- endmacro %}
