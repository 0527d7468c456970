"""The types on this pack's wires."""

from comfy_api.latest import io

TrainingDataType = io.Custom("TRAINING_DATA")  # trainers.core.data.TrainingData
TrainingJobType = io.Custom("TRAINING_JOB")  # the id of a job
TrainingSamplesType = io.Custom("TRAINING_SAMPLES")  # trainers.run.previews.Previews
I2vAdaptersType = io.Custom("I2V_ADAPTERS")  # a tuple of nodes.adapters.loading.Loaded
AttentionMapsType = io.Custom("ATTENTION_MAPS")  # trainers.conditions.attention_maps.AttentionMaps
TrackletsType = io.Custom("TRACKLETS")  # trainers.conditions.tracklets.Tracklets
TrackletControlType = io.Custom("TRACKLET_CONTROL")  # (ModelPatcher of a TrackletControl, layers of the base model)
MotionModuleType = io.Custom("MOTION_MODULE")  # a ModelPatcher of MotionModules
EvolvedModelType = io.Custom("MOTION_MODEL_ADE")  # AnimateDiff-Evolved's
