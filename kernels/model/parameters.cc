#include "kernels/model/parameters.h"

#include "absl/strings/str_cat.h"

namespace coppice {
namespace {

constexpr int64_t kAlignElements = 64;

// Hands out consecutive, aligned slices of the arena. A null base counts only.
class ArenaCursor {
 public:
  ArenaCursor(void* base, DType dtype) : base_(static_cast<char*>(base)), dtype_(dtype) {}

  TensorView Vector(int64_t n) { return View1D(Take(n), dtype_, n); }
  TensorView Matrix(int64_t rows, int64_t cols) {
    return View2D(Take(rows * cols), dtype_, rows, cols);
  }
  int64_t offset() const { return offset_; }

 private:
  void* Take(int64_t n) {
    void* data = base_ == nullptr ? nullptr : base_ + offset_ * SizeOf(dtype_);
    offset_ += (n + kAlignElements - 1) / kAlignElements * kAlignElements;
    return data;
  }

  char* base_;
  DType dtype_;
  int64_t offset_ = 0;
};

LayerParameters MapLayer(const ModelConfig& c, ArenaCursor& arena) {
  LayerParameters l;
  l.attn_norm = arena.Vector(c.hidden);
  l.qkv = arena.Matrix(c.qkv_dim(), c.hidden);
  if (c.qkv_bias) l.qkv_bias = arena.Vector(c.qkv_dim());
  if (c.qk_norm) {
    l.q_norm = arena.Vector(c.head_dim);
    l.k_norm = arena.Vector(c.head_dim);
  }
  l.o = arena.Matrix(c.hidden, c.q_dim());
  l.mlp_norm = arena.Vector(c.hidden);
  l.gate_up = arena.Matrix(2 * c.ffn, c.hidden);
  l.down = arena.Matrix(c.hidden, c.ffn);
  return l;
}

// Names the q, k and v row ranges of a merged matrix or bias.
void AppendQkv(const ModelConfig& c, const std::string& prefix, const char* suffix,
               const TensorView& merged, bool decay, std::vector<NamedTensor>& out) {
  const int64_t q = c.q_dim(), kv = c.kv_dim();
  out.push_back({absl::StrCat(prefix, "q_proj.", suffix), merged.Rows(0, q), decay});
  out.push_back({absl::StrCat(prefix, "k_proj.", suffix), merged.Rows(q, q + kv), decay});
  out.push_back({absl::StrCat(prefix, "v_proj.", suffix), merged.Rows(q + kv, q + 2 * kv), decay});
}

void AppendLayer(const ModelConfig& c, int64_t index, const LayerParameters& l,
                 std::vector<NamedTensor>& out) {
  const std::string prefix = absl::StrCat("model.layers.", index, ".");
  const std::string attn = prefix + "self_attn.", mlp = prefix + "mlp.";
  out.push_back({prefix + "input_layernorm.weight", l.attn_norm, false});
  AppendQkv(c, attn, "weight", l.qkv, true, out);
  if (c.qkv_bias) AppendQkv(c, attn, "bias", l.qkv_bias, false, out);
  if (c.qk_norm) {
    out.push_back({attn + "q_norm.weight", l.q_norm, false});
    out.push_back({attn + "k_norm.weight", l.k_norm, false});
  }
  out.push_back({attn + "o_proj.weight", l.o, true});
  out.push_back({prefix + "post_attention_layernorm.weight", l.mlp_norm, false});
  out.push_back({mlp + "gate_proj.weight", l.gate_up.Rows(0, c.ffn), true});
  out.push_back({mlp + "up_proj.weight", l.gate_up.Rows(c.ffn, 2 * c.ffn), true});
  out.push_back({mlp + "down_proj.weight", l.down, true});
}

}  // namespace

int64_t NumParameterElements(const ModelConfig& config) {
  return MapParameters(config, nullptr, DType::kF32).flat.num_elements();
}

int64_t NumParameters(const ModelConfig& config) {
  const Parameters p = MapParameters(config, nullptr, DType::kF32);
  int64_t n = p.embedding.num_elements() + p.final_norm.num_elements();
  if (!config.tied_head) n += p.head.num_elements();
  for (const LayerParameters& l : p.layers) {
    for (const TensorView& t :
         {l.attn_norm, l.qkv, l.qkv_bias, l.q_norm, l.k_norm, l.o, l.mlp_norm, l.gate_up, l.down}) {
      n += t.num_elements();
    }
  }
  return n;
}

Parameters MapParameters(const ModelConfig& config, void* base, DType dtype) {
  ArenaCursor arena(base, dtype);
  Parameters p;
  p.embedding = arena.Matrix(config.vocab, config.hidden);
  for (int64_t l = 0; l < config.num_layers; ++l) p.layers.push_back(MapLayer(config, arena));
  p.final_norm = arena.Vector(config.hidden);
  p.head = config.tied_head ? p.embedding : arena.Matrix(config.vocab, config.hidden);
  p.flat = View1D(base, dtype, arena.offset());
  return p;
}

std::vector<NamedTensor> HfTensors(const ModelConfig& config, const Parameters& params) {
  std::vector<NamedTensor> out;
  out.push_back({"model.embed_tokens.weight", params.embedding, true});
  for (int64_t l = 0; l < config.num_layers; ++l) AppendLayer(config, l, params.layers[l], out);
  out.push_back({"model.norm.weight", params.final_norm, false});
  if (!config.tied_head) out.push_back({"lm_head.weight", params.head, true});
  return out;
}

}  // namespace coppice
