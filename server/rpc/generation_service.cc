#include <chrono>
#include <utility>

#include "coppice/v1/generation.grpc.pb.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/field_check.h"
#include "server/rpc/services.h"
#include "server/rpc/token_stream.h"
#include "server/rpc/unary.h"

namespace coppice {
namespace {

// The client's deadline on the engine's clock; absent if it gave none.
std::optional<absl::Duration> Deadline(const grpc::CallbackServerContext& context,
                                       const Clock& clock) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return std::nullopt;
  return clock.Now() + absl::FromChrono(deadline - std::chrono::system_clock::now());
}

// One Generate call: the connection's side of its TokenStream. Owned by gRPC, deletes itself in
// OnDone.
class GenerateReactor final : public grpc::ServerWriteReactor<v1::GenerateEvent>,
                              public TokenStream::Transport {
 public:
  GenerateReactor(const RpcContext& context, grpc::CallbackServerContext* call,
                  const v1::GenerateRequest& proto) {
    absl::StatusOr<GenerateRequest> request = Translate(context, *call, proto);
    TokenStream::Options options;
    options.capacity = context.stream_capacity;
    options.wake_engine = [&engine = context.engine] { engine.Wake(); };
    if (request.ok() && proto.prompt().has_text()) options.prompt_echo = request->prompt;
    stream_ = std::make_shared<TokenStream>(std::move(options), *this);
    absl::Status status = request.status();
    if (status.ok()) status = context.engine.Submit(*std::move(request), stream_);
    if (!status.ok()) stream_->Refuse(status);
  }

  // ---- gRPC's reactions
  void OnWriteDone(bool ok) override { stream_->WriteDone(ok); }
  void OnCancel() override { stream_->Cancel(); }
  void OnDone() override { delete this; }

  // ---- TokenStream::Transport
  void Write(const v1::GenerateEvent* event) override { StartWrite(event); }
  void Finish(const absl::Status& status) override {
    ServerWriteReactor::Finish(ToGrpcStatus(status));
  }

 private:
  static absl::StatusOr<GenerateRequest> Translate(const RpcContext& context,
                                                   const grpc::CallbackServerContext& call,
                                                   const v1::GenerateRequest& proto) {
    ASSIGN_OR_RETURN(const Tenant tenant, TenantOf(call, context));
    absl::StatusOr<GenerateRequest> request = FromProto(proto, tenant, context.limits());
    if (!request.ok()) return At("generate refused: ", request.status());
    request->deadline = Deadline(call, context.clock);
    return request;
  }

  std::shared_ptr<TokenStream> stream_;  // shared with the engine until its OnDone
};

class GenerationService final : public v1::Generation::CallbackService {
 public:
  explicit GenerationService(const RpcContext& context) : context_(context) {}

  grpc::ServerWriteReactor<v1::GenerateEvent>* Generate(
      grpc::CallbackServerContext* call, const v1::GenerateRequest* request) override {
    return new GenerateReactor(context_, call, *request);
  }

  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* call,
                                  const v1::ScoreRequest* request,
                                  v1::ScoreResponse* response) override {
    const absl::StatusOr<Tenant> tenant = TenantOf(*call, context_);
    if (!tenant.ok()) return FinishNow(call, tenant.status());
    absl::StatusOr<ScoreRequest> score = FromProto(*request, *tenant, context_.limits());
    if (!score.ok()) return FinishNow(call, At("score refused: ", score.status()));
    score->abandoned = [call] { return call->IsCancelled(); };  // `call` lives until it is answered
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.Score(
        *std::move(score), FinishWith<ScoreResult>(reactor, [response](const ScoreResult& result) {
          for (const SampleResult& sample : result.samples) {
            v1::ScoredResponse* out = response->add_responses();
            out->mutable_logprobs()->Add(sample.logprobs.begin(), sample.logprobs.end());
            out->set_entropy(sample.entropy);
          }
          response->set_policy_version(Raw(result.policy_version));
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Warm(grpc::CallbackServerContext* call, const v1::WarmRequest* request,
                                 v1::WarmResponse* response) override {
    absl::StatusOr<Tenant> tenant = TenantOf(*call, context_);
    if (!tenant.ok()) return FinishNow(call, tenant.status());
    absl::StatusOr<GenerateRequest> warm = FromProto(*request, *tenant, context_.limits());
    if (!warm.ok()) return FinishNow(call, At("warm refused: ", warm.status()));
    warm->deadline = Deadline(*call, context_.clock);
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.Warm(*std::move(warm),
                         FinishWith<WarmResult>(reactor, [response](const WarmResult& result) {
                           *response->mutable_usage() = ToProto(result.usage);
                           response->set_policy_version(Raw(result.policy_version));
                         }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* call,
                                  const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override {
    absl::StatusOr<Tenant> tenant = TenantOf(*call, context_);
    if (!tenant.ok()) return FinishNow(call, tenant.status());
    absl::StatusOr<AbortCall> abort = FromProto(*request, *tenant);
    if (!abort.ok()) return FinishNow(call, At("abort refused: ", abort.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.Abort(
        std::move(abort->request_id), std::move(abort->session_id),
        FinishWith<AbortResult>(reactor, [this, response](const AbortResult& result) {
          response->set_aborted(result.aborted);
          response->set_policy_version(Raw(context_.engine.policy_version()));
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* call,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    if (absl::Status s = TenantOf(*call, context_).status(); !s.ok()) return FinishNow(call, s);
    const Tokenizer* tokenizer = context_.model.tokenizer.get();
    if (tokenizer == nullptr) return FinishNow(call, NoTokenizer("tokenize refused"));
    const bool add_special = !request->has_add_special() || request->add_special();
    const std::vector<int32_t> ids = tokenizer->Encode(request->text(), add_special);
    response->mutable_token_ids()->Add(ids.begin(), ids.end());
    response->set_policy_version(Raw(context_.engine.policy_version()));
    return FinishNow(call, absl::OkStatus());
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* call,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    if (absl::Status s = TenantOf(*call, context_).status(); !s.ok()) return FinishNow(call, s);
    const Tokenizer* tokenizer = context_.model.tokenizer.get();
    if (tokenizer == nullptr) return FinishNow(call, NoTokenizer("detokenize refused"));
    const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
    const absl::Status status = CheckTokenIds("token_ids", ids, context_.model.config.vocab);
    if (!status.ok()) return FinishNow(call, At("detokenize refused: ", status));
    response->set_text(tokenizer->Decode(ids, request->skip_special()));
    response->set_policy_version(Raw(context_.engine.policy_version()));
    return FinishNow(call, absl::OkStatus());
  }

 private:
  const RpcContext& context_;
};

}  // namespace

absl::StatusOr<Tenant> TenantOf(const grpc::CallbackServerContext& call,
                                const RpcContext& context) {
  if (!context.trust_tenant_header) return Tenant{};
  const auto [begin, end] = call.client_metadata().equal_range(kTenantHeader);
  if (std::distance(begin, end) != 1) {
    return absl::UnauthenticatedError(absl::StrCat("call refused: want one ", kTenantHeader,
                                                   " header, got ", std::distance(begin, end),
                                                   "; call through the authenticating proxy"));
  }
  const std::string name(begin->second.data(), begin->second.size());
  const absl::Status status = CheckPlainName(kTenantHeader, name);
  if (!status.ok()) {
    return absl::UnauthenticatedError(absl::StrCat("call refused: ", status.message()));
  }
  return Tenant{.salt = "tenant:" + name, .prefix = name + "/"};
}

std::unique_ptr<grpc::Service> NewGenerationService(const RpcContext& context) {
  return std::make_unique<GenerationService>(context);
}

}  // namespace coppice
