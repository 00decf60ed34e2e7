{# Sliding windows kept ready: one row per (keys, window_end) and 5-minute step, with what each measure that declares `window` stores, over
   the events in [window_end - window, window_end) that stand now. Where window_end is a closed tick that is the block-fresh value as
   corrected. Every event is in window / 5m rows, so windows of more than a day are read from blocks. RisingWave (HOP). #}
{% macro sliding_windows(features, events, retracted, window) -%}
{%- set measures = [] -%}
{%- for measure in features['measures'] if window in measure.windows -%}{%- do measures.append(measure) -%}{%- endfor -%}
{%- if execute and not measures -%}
    {{ exceptions.raise_compiler_error("sliding_windows: no measure declares the window " ~ window ~ "; give one that is declared") }}
{%- endif -%}
{%- if is_session(window) == 'yes' or window == 'lifetime' or window_seconds(window) | int > 86400 -%}
    {{ exceptions.raise_compiler_error("sliding_windows: a window is at most 1d, as each event is kept once per 5 minutes of it; got " ~ window) }}
{%- endif -%}
{%- set keys = features['keys'] -%}
with standing_events as (
    {{ standing_events(with_calendar(features, events, 'event_ts'), retracted, keys) }}
)

select
    {%- for key in keys %}
    {{ key }},
    {%- endfor %}
    window_end,
    {%- for measure in measures %}
    {{ mapped(measure) }}{{ ',' if not loop.last }}
    {%- endfor %}
from hop(standing_events, event_ts, interval '5 minutes', {{ seconds(window_seconds(window) | int) }})
group by
    {%- for key in keys %}
    {{ key }},
    {%- endfor %}
    window_end
{%- endmacro %}
