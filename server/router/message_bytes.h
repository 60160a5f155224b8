// Messages in and out of gRPC's byte buffers, for the few that the router looks into. Any thread.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"

namespace coppice {

// INVALID_ARGUMENT if the bytes are no such message. `buffer` is only read; its slices are shared,
// not copied.
template <typename Message>
absl::StatusOr<Message> Parse(const grpc::ByteBuffer& buffer) {
  grpc::ByteBuffer shared(buffer);
  Message message;
  const grpc::Status status = grpc::SerializationTraits<Message>::Deserialize(&shared, &message);
  if (status.ok()) return message;
  return absl::InvalidArgumentError(absl::StrCat("call refused: want a ", message.GetTypeName(),
                                                 ", got bytes that are none; ",
                                                 "use a client of coppice.v1"));
}

template <typename Message>
void Serialize(const Message& message, grpc::ByteBuffer& buffer) {
  buffer.Clear();  // gRPC wants it empty
  bool own_buffer = false;
  grpc::SerializationTraits<Message>::Serialize(message, &buffer, &own_buffer);
}

// Merges `addition` into the message that `buffer` holds, as protobuf does with fields that come
// again: the later number or text counts, messages are merged. Nothing of `buffer` is copied.
template <typename Message>
void Append(const Message& addition, grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  if (buffer.Valid() && !buffer.Dump(&slices).ok()) return;
  slices.emplace_back(addition.SerializeAsString());
  buffer = grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace coppice
