"""What the configuration names: jobs, and components, whose values are checked against the constructor's types."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, get_type_hints

import hydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from slimstep.engine.config import as_dict
from slimstep.engine.planning import Plan

ANY_CLASS = ConfigDict(arbitrary_types_allowed=True)


def component(config: DictConfig, key: str, offered: Mapping[str, Any] = MappingProxyType({}), **kwargs: Any) -> Any:
    """What `key` of the configuration describes; ValueError where it describes nothing, or with wrong values.

    Of what is `offered` its constructor is given what it takes. What it raises for a user's mistake is raised as it is,
    without Hydra's words around it.
    """
    described = OmegaConf.select(config, key)
    check(described, key)
    taken = inspect.signature(hydra.utils.get_object(described["_target_"])).parameters if offered else {}
    kwargs |= {name: value for name, value in offered.items() if name in taken}
    try:
        return instantiate(described, **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def check(described: Any, key: str) -> None:
    """ValueError for a description without a target, or whose values are not of the types that the target declares."""
    if not OmegaConf.is_dict(described) or not described.get("_target_"):
        raise ValueError(f"{key}={described} describes nothing that can be made: it has no _target_")
    try:
        target = hydra.utils.get_object(described["_target_"])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{key}._target_={described['_target_']}: {str(error).splitlines()[0]}") from error
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in as_dict(described).items():
        if name not in hints or (isinstance(value, dict) and "_target_" in value):
            continue  # unknown names are reported when it is made; what has a target is checked by its own
        try:
            TypeAdapter(hints[name], config=ANY_CLASS).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{key}.{name}={value!r}: {error.errors()[0]['msg']}") from error


def named_job(name: str) -> Callable[..., int | Plan]:
    """The function that the configuration names. ValueError where there is none, or it is no job."""
    try:
        job = hydra.utils.get_method(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"job={name} is no function of this project: {' '.join(str(error).split())}") from error
    if list(getattr(job, "__annotations__", {})) != ["config", "run", "return"]:
        raise ValueError(f"job={name} is no job: that is a function (config: Config, run: Run) -> int")
    return job
