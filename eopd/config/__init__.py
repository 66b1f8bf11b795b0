"""What a run is: YAML in, one frozen ``Config`` out. Loads neither torch nor ray."""

from eopd.config.benchmark import BenchmarkConfig
from eopd.config.errors import ConfigError, UnavailableError
from eopd.config.learner import LearnerConfig
from eopd.config.load import dump_config, load_config, make_section, read_leaves
from eopd.config.loss import LossConfig
from eopd.config.prompts import Part, PromptsConfig, TrainingPart
from eopd.config.rollout import RolloutConfig
from eopd.config.root import Config
from eopd.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    FlowConfig,
    GuardConfig,
    KeepBestConfig,
    LoraConfig,
    ResponsesConfig,
    RunConfig,
    StudentConfig,
    TelemetryConfig,
    TrackerName,
    WeightsConfig,
)
from eopd.config.teacher import ServerConfig, TeacherConfig

__all__ = [
    "BenchmarkConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "EvaluationConfig",
    "FlowConfig",
    "GuardConfig",
    "KeepBestConfig",
    "LearnerConfig",
    "LoraConfig",
    "LossConfig",
    "Part",
    "PromptsConfig",
    "ResponsesConfig",
    "RolloutConfig",
    "RunConfig",
    "ServerConfig",
    "StudentConfig",
    "TeacherConfig",
    "TelemetryConfig",
    "TrackerName",
    "TrainingPart",
    "UnavailableError",
    "WeightsConfig",
    "dump_config",
    "load_config",
    "make_section",
    "read_leaves",
]
