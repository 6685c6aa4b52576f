"""Who answers requests: engines here, in how many pieces, or a server."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from lar_lightning.errors import SettingError

LocalEngineName = Literal["auto", "vllm", "transformers"]
EngineName = LocalEngineName | Literal["remote"]


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """Whom the engine `remote` asks, and how patiently."""

    server: tuple[str, ...] | str = ()
    """Address of an OpenAI-compatible server that takes and returns token ids, as vLLM's does
    (http://host:8000); for methods with checkpoints of their own a list, one server each."""
    served_model: str = ""
    """The model's name there. Left empty, it is the one that fits the checkpoint."""
    api_key_variable: str = "VLLM_API_KEY"
    """Environment variable that holds the servers' key, if they want one."""
    request_seconds: float = 600.0
    """Longest wait for an answer before it is asked for again."""
    num_retries: int = 7
    """Times that an answer is asked for again where a server is busy, fails or is gone. The pauses
    double from half a second up to 30: as set here a minute in all, time for a restart."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Addresses, without a path's last slash."""
        named = (self.server,) if isinstance(self.server, str) else self.server
        return tuple(address.rstrip("/").removesuffix("/v1") for address in named if address)

    def check_remote(self, group: str, engine: str) -> None:
        """Refuse what no client can do; `group` is where the settings stand."""
        if bool(self.servers) != (engine == "remote"):
            raise SettingError(
                f"`{group}.server` and `{group}.engine: remote` need each other, got "
                f"{self.server!r} and {engine!r}. Set both, as in `{group}.server: "
                f"http://localhost:8000`, or neither."
            )
        for address in self.servers:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
                raise SettingError(
                    f"`{group}.server` must be an address such as http://localhost:8000, got "
                    f"{address!r}."
                )
            if parts.username is not None:
                raise SettingError(
                    f"`{group}.server` must hold no user or password, which would stand in logs. "
                    f"Put a key into the environment variable `{group}.api_key_variable`."
                )
        if not self.request_seconds > 0:
            raise SettingError(
                f"`{group}.request_seconds` must be positive, got {self.request_seconds}."
            )
        if self.num_retries < 0:
            raise SettingError(f"`{group}.num_retries` must be at least 0, got {self.num_retries}.")


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(RemoteSettings):
    """Where an engine runs: how it spreads over devices, or on which servers it is."""

    tensor_parallel_size: int = 1
    """Devices that share one copy of the model; vLLM alone can."""
    data_parallel_size: int = 1
    """Copies of the model, each in a process and on devices of its own, that share the requests.
    They change no result but by the rounding of other batches."""
    distributed_executor_backend: Literal["auto", "mp", "ray"] = "auto"
    """What starts vLLM's workers where `tensor_parallel_size` is above 1: processes of this
    machine (`mp`, and what `auto` takes), or Ray, which also reaches other nodes."""

    def check_parallel(self, group: str, engine: EngineName) -> None:
        """Refuse sizes that no engine can have; `group` is where the settings stand."""
        self.check_remote(group, engine)
        for name in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise SettingError(
                    f"`{group}.{name}` must be at least 1, got {getattr(self, name)}."
                )
        size = self.tensor_parallel_size * self.data_parallel_size
        if engine == "remote" and size > 1:
            raise SettingError(
                f"`{group}.tensor_parallel_size` and `{group}.data_parallel_size` must be 1 with "
                f"`{group}.engine: remote`, got {self.tensor_parallel_size} and "
                f"{self.data_parallel_size}: how a server spreads is set where it is started."
            )
        if engine == "transformers" and self.tensor_parallel_size > 1:
            raise SettingError(
                f"`{group}.tensor_parallel_size` must be 1 with `{group}.engine: transformers`, "
                f"got {self.tensor_parallel_size}. Choose the engine vllm, or raise "
                f"`{group}.data_parallel_size`."
            )
        if self.distributed_executor_backend == "ray" and self.data_parallel_size > 1:
            raise SettingError(
                f"`{group}.data_parallel_size` must be 1 with `{group}."
                f"distributed_executor_backend: ray`, got {self.data_parallel_size}: Ray gives out "
                "devices by itself. Choose `mp`, or shard the tasks with `rollout --shard`."
            )
