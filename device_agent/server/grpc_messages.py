"""The messages of ``inference.GRPCInferenceService``, as tables.

Names and numbers are those of the Open Inference Protocol v2 and of Triton's extensions to it: what is not
the same here would not be understood by their clients. Only what this server reads or writes is listed;
``tests`` compares every line with the descriptors that Triton's client carries.

Two messages are larger than what stands here. The tensors of ``ModelInferRequest`` and ``ModelInferResponse``
are read and written by :mod:`device_agent.server.grpc_protocol`, in place; ``contents`` of an input is left
unread for the same reason.
"""

from __future__ import annotations

from device_agent.server.wire_schema import parse_schema

SCHEMA = parse_schema("""
message Empty

message ServerLiveResponse
  1 bool live

message ServerReadyResponse
  1 bool ready

message ModelReadyRequest
  1 string name
  2 string version

message ModelReadyResponse
  1 bool ready

message ServerMetadataResponse
  1 string name
  2 string version
  3 string* extensions

message ModelMetadataRequest
  1 string name
  2 string version

message ModelMetadataResponse
  1 string name
  2 string* versions
  3 string platform
  4 TensorMetadata* inputs
  5 TensorMetadata* outputs

message TensorMetadata
  1 string name
  2 string datatype
  3 int64* shape

message InferParameter
  1 bool? bool_param
  2 int64? int64_param
  3 string? string_param
  4 double? double_param
  5 uint64? uint64_param

message ModelInferRequest
  4 map<string,InferParameter> parameters
  5 InferInputTensor* inputs
  6 InferRequestedOutputTensor* outputs

message InferInputTensor
  1 string name
  2 string datatype
  3 int64* shape
  4 map<string,InferParameter> parameters
  5 bytes contents

message InferRequestedOutputTensor
  1 string name
  2 map<string,InferParameter> parameters

message InferOutputTensor
  1 string name
  2 string datatype
  3 int64* shape
  4 map<string,InferParameter> parameters

message ModelConfigRequest
  1 string name
  2 string version

message ModelConfigResponse
  1 ModelConfig config

message ModelConfig
  1 string name
  2 string platform
  3 ModelVersionPolicy version_policy
  4 int32 max_batch_size
  5 ModelInput* input
  6 ModelOutput* output
  7 ModelInstanceGroup* instance_group
  8 string default_model_filename
  10 map<string,string> metric_tags
  11 ModelDynamicBatching dynamic_batching
  14 map<string,ModelParameter> parameters
  16 ModelWarmup* model_warmup
  17 string backend
  24 ModelResponseCache response_cache

message ModelVersionPolicy
  1 LatestVersions latest
  2 Empty all
  3 SpecificVersions specific

message LatestVersions
  1 uint32 num_versions

message SpecificVersions
  1 int64* versions

message ModelInput
  1 string name
  2 DataType data_type
  4 int64* dims
  5 ModelTensorReshape reshape
  7 bool allow_ragged_batch
  8 bool optional

message ModelOutput
  1 string name
  2 DataType data_type
  3 int64* dims
  4 string label_filename
  5 ModelTensorReshape reshape

message ModelTensorReshape
  1 int64* shape

message ModelInstanceGroup
  1 string name
  2 int32 count
  4 InstanceKind kind

message ModelDynamicBatching
  1 int32* preferred_batch_size
  2 uint64 max_queue_delay_microseconds
  3 bool preserve_ordering
  4 uint64 priority_levels
  5 uint64 default_priority_level
  6 ModelQueuePolicy default_queue_policy
  7 map<uint64,ModelQueuePolicy> priority_queue_policy

message ModelQueuePolicy
  1 TimeoutAction timeout_action
  2 uint64 default_timeout_microseconds
  3 bool allow_timeout_override
  4 uint32 max_queue_size

message ModelWarmup
  1 string name
  2 uint32 batch_size
  3 map<string,WarmupInput> inputs
  4 uint32 count

message WarmupInput
  1 DataType data_type
  2 int64* dims
  3 bool? zero_data
  4 bool? random_data
  5 string? input_data_file

message ModelResponseCache
  1 bool enable

message ModelParameter
  1 string string_value

enum DataType
  1 TYPE_BOOL
  2 TYPE_UINT8
  3 TYPE_UINT16
  4 TYPE_UINT32
  5 TYPE_UINT64
  6 TYPE_INT8
  7 TYPE_INT16
  8 TYPE_INT32
  9 TYPE_INT64
  10 TYPE_FP16
  11 TYPE_FP32
  12 TYPE_FP64
  13 TYPE_STRING
  14 TYPE_BF16

enum InstanceKind
  0 KIND_AUTO
  1 KIND_GPU
  2 KIND_CPU
  3 KIND_MODEL

enum TimeoutAction
  0 REJECT
  1 DELAY

message ModelStatisticsRequest
  1 string name
  2 string version

message ModelStatisticsResponse
  1 ModelStatistics* model_stats

message ModelStatistics
  1 string name
  2 string version
  3 uint64 last_inference
  4 uint64 inference_count
  5 uint64 execution_count
  6 InferStatistics inference_stats
  7 InferBatchStatistics* batch_stats

message InferStatistics
  1 StatisticDuration success
  2 StatisticDuration fail
  3 StatisticDuration queue
  4 StatisticDuration compute_input
  5 StatisticDuration compute_infer
  6 StatisticDuration compute_output
  7 StatisticDuration cache_hit
  8 StatisticDuration cache_miss

message InferBatchStatistics
  1 uint64 batch_size
  2 StatisticDuration compute_input
  3 StatisticDuration compute_infer
  4 StatisticDuration compute_output

message StatisticDuration
  1 uint64 count
  2 uint64 ns

message RepositoryIndexRequest
  1 string repository_name
  2 bool ready

message RepositoryIndexResponse
  1 ModelIndex* models

message ModelIndex
  1 string name
  2 string version
  3 string state
  4 string reason

message ModelRepositoryParameter
  1 bool? bool_param
  2 int64? int64_param
  3 string? string_param
  4 bytes? bytes_param

message RepositoryModelLoadRequest
  1 string repository_name
  2 string model_name
  3 map<string,ModelRepositoryParameter> parameters

message RepositoryModelUnloadRequest
  1 string repository_name
  2 string model_name
  3 map<string,ModelRepositoryParameter> parameters

message SystemSharedMemoryStatusRequest
  1 string name

message SystemSharedMemoryStatusResponse
  1 map<string,RegionStatus> regions

message RegionStatus
  1 string name
  2 string key
  3 uint64 offset
  4 uint64 byte_size

message SystemSharedMemoryRegisterRequest
  1 string name
  2 string key
  3 uint64 offset
  4 uint64 byte_size

message SystemSharedMemoryUnregisterRequest
  1 string name

message Status
  1 int32 code
  2 string message
  3 Any* details

message Any
  1 string type_url
  2 bytes value

message RetryInfo
  1 Duration retry_delay

message Duration
  1 int64 seconds
  2 int32 nanos
""")
