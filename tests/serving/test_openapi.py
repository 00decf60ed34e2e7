"""Requests made up from the OpenAPI description, over real HTTP: no answer may be a 5xx or differ from what is described.

HEADRACE_API_CASES is how many requests at least; `make faults` asks for ten thousand.
"""

import itertools
import os
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CASES = int(os.environ.get("HEADRACE_API_CASES", "400"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def test_every_answer_is_the_one_described(server):
    schema = schemathesis.openapi.from_url(f"{server.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    with_input = [one for one in operations if one.body or one.query or one.path_parameters]
    cases = -(-CASES // (len(with_input) * len(GenerationMode)))
    answered = Counter()
    for operation, mode in itertools.product(operations, GenerationMode):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=cases,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        def answers_as_described(case):
            answer = case.call()
            answered[(case.method, case.path), answer.status_code] += 1
            case.validate_response(answer, checks=CHECKS)

        try:
            answers_as_described()
        except Unsatisfiable:  # nothing can be sent that is wrong
            assert mode is GenerationMode.NEGATIVE
            assert operation not in with_input
    assert answered.total() >= CASES * 0.95  # the generator may run out of different ones
    assert {(operation.method.upper(), operation.path) for operation in operations} == {asked for asked, _ in answered}
    print(
        f"{answered.total():,} requests",
        *(f"{' '.join(asked)} {status}: {n}" for (asked, status), n in answered.items()),
        sep="\n",
    )
