"""What RisingWave's documentation lists and the streaming models may use (docs.risingwave.com/sql/functions, read for 2.x).

Not there, and therefore not here: qualify, time_bucket, list, histogram, any_value, median, approx_quantile, count_if,
date_diff, epoch_ms, hash. Lower case, as written in the SQL.
"""

FUNCTIONS = {
    # aggregates
    "count", "sum", "min", "max", "avg", "var_pop", "array_agg", "first_value", "last_value", "string_agg", "jsonb_agg",
    # window functions
    "lag", "lead", "row_number", "rank", "dense_rank",
    # scalars
    "md5", "substr", "strpos", "ltrim", "length",
    "coalesce", "nullif", "greatest", "least", "abs", "sqrt", "ln", "floor", "ceil", "round",
    "date_bin", "date_trunc", "extract", "to_timestamp", "now", "jsonb_build_object", "to_jsonb", "cast",
    # table functions
    "hop",
}  # fmt: skip
KEYWORDS = {
    "as", "and", "or", "not", "in", "from", "where", "by", "filter", "over", "when", "then", "else", "on", "select", "join",
}  # fmt: skip
"""Words that may stand before a parenthesis without being a function."""
OPERATORS = {"->>", "->", "~"}
