"""pytest -p verl_plugin: verl's own tests with rlkern's functions under verl's names."""

import atexit
import json
import os

from rlkern.integrations import verl as integration

CALLS = dict.fromkeys([*integration.TWINS, *integration.ESTIMATORS], 0)


def counted(function):
    def call(name, *args, **kwargs):
        CALLS[name] += 1
        return function(name, *args, **kwargs)

    return call


integration._twin = counted(integration._twin)
integration._estimator = counted(integration._estimator)
integration.enable(replace=True)


def _write() -> None:
    if path := os.environ.get("RLKERN_CALLS"):
        with open(path, "w") as file:
            json.dump(CALLS, file)


atexit.register(_write)
