// Sampling of tokens. The logits of a row become probabilities relative to the most likely token (masses), filtered ones
// become 0, and the cumulative distribution is inverted, in the order of the tokens.
#include "layout.h"
#include "simd.h"

#include <algorithm>
#include <vector>

// B rows, V tokens.
struct Sample {
  const void* logits;          // (B, V)
  const int64_t* rows;         // (B,): a row's index in the columns below; null: its own index
  const float* temperature;    // 0: the most likely token, with its log-probability at temperature 1
  const int64_t* top_k;        // 0 for all; null, with the next two, for no filters
  const float *top_p, *min_p;
  const double* uniform;       // (B,), in [0, 1); null: numbers that depend on
  const uint64_t* seed;        // the row's seed and
  const int64_t *num_tokens, *num_prompt_tokens, *offsets;  // the tokens sampled so far: num_tokens - num_prompt_tokens + offsets (B,)
  int64_t* tokens;             // (B,): sampled
  float* logprobs;            // (B,): under the sampling distribution; NaN if it is not finite
  int64_t B, V, threads;
};

// The `count` most likely tokens of B rows, V tokens; sorted, among equals the lower first.
struct TopLogprobs {
  const void* logits;        // (B, V)
  const float* temperature;  // (B,), as in Sample
  int64_t* ids;              // (B, count)
  float* logprobs;           // (B, count)
  int64_t B, V, count, threads;
};

// n rows with W tokens each, V logits per row.
struct Penalties {
  float* logits;             // changed in place
  const int64_t* entries;    // (n,): a row's index in the logits
  const int64_t* tokens;     // (n, W)
  const float* num_outputs;  // (n, W): how often each token was sampled
  const uint8_t* is_valid;   // (n, W)
  const float *repetition, *presence, *frequency;  // (n,)
  int64_t n, W, V, threads;
};

// n rows of V logits, W = ceil(V / 32).
struct TokenBitmask {
  float* logits;            // changed in place: -infinity where the bit is 0
  const int64_t* entries;   // (n,): a row's index in the logits
  const uint32_t* bitmask;  // (n, W)
  int64_t n, W, V, threads;
};

namespace {

constexpr int64_t CHUNK = 256;      // masses that are summed in float; sums over chunks are double
constexpr float LIKELY = 0x1p-12f;  // the end of the filtered set is first searched among tokens of at least this mass

template <typename T>
float largest_of(const T* row, int64_t V) {
  vf top = splat(-INFINITY);
  int64_t c = 0;
  for (; c + LANES <= V; c += LANES) top = larger(load(row + c), top);
  float best = largest(top);
  for (; c < V; c++) best = std::max(best, to_float(row[c]));
  return best;
}

// The masses of one row, relative to the largest; padded with 0 to whole vectors.
class Masses {
 public:
  explicit Masses(int64_t V) : V_(V), held_(make_buffer<float>(V)), chunks_((V + CHUNK - 1) / CHUNK) {}

  template <typename T>
  void take(const T* row, float top, float inverse_temperature) {
    for (int64_t c = 0; c < V_; c += LANES) store(held_.get() + c, exp_of((load_some(row + c, V_ - c) - top) * inverse_temperature));
    std::fill(held_.get() + V_, held_.get() + round_up(V_), 0.0f);
  }

  // The sum of the masses; also stores the sums of chunks.
  double total() {
    double found = 0;
    for (int64_t n = 0; n < int64_t(chunks_.size()); n++) {
      vf own{};
      for (int64_t c = n * CHUNK; c < std::min((n + 1) * CHUNK, V_); c += LANES) own += load(held_.get() + c);
      found += chunks_[n] = sum(own);
    }
    return found;
  }

  // The first token whose cumulative mass exceeds `target`, which is less than the sum. Requires total().
  int64_t find(double target) const {
    double before = 0;
    const int64_t chunk = part(0, int64_t(chunks_.size()), target, before, [&](int64_t n) { return chunks_[n]; });
    const int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, round_up(V_));
    const int64_t vector = part(begin / LANES, end / LANES, target, before, [&](int64_t n) { return sum(load(held_.get() + n * LANES)); });
    return part(vector * LANES, (vector + 1) * LANES, target, before, [&](int64_t i) { return held_[i]; });
  }

  // Remove tokens below min_p, then all but the top_k most likely (0: none), then all but the smallest set with the share
  // top_p of the rest. Of equals the lower tokens come first.
  void filter(int64_t top_k, float top_p, float min_p) {
    if (min_p > 0) drop([&](Token token) { return token.mass < min_p; });
    if (top_k > 0 && top_k < V_) cut([&](int64_t count, double) { return count >= top_k; });
    if (top_p < 1) {
      const double target = top_p * total();
      cut([&](int64_t, double mass) { return mass >= target; });
    }
  }

 private:
  struct Token {
    float mass;
    int64_t index;
    bool operator<(const Token& other) const { return mass > other.mass || (mass == other.mass && index < other.index); }
  };
  struct Bin {
    int64_t count;
    double mass;
  };
  static constexpr int SHIFT = 19;  // of a float's bits: sixteen bins per power of 2
  static int64_t bin(float mass) {
    uint32_t bits;
    std::memcpy(&bits, &mass, 4);
    return bits >> SHIFT;
  }

  // each(token) with a mass of at least `least`.
  template <typename Each>
  void for_each(float least, Each each) const {
    for (int64_t c = 0; c < V_; c += LANES)
      if (any(load(held_.get() + c) >= least))
        for (int64_t i = c; i < std::min(c + LANES, V_); i++)
          if (held_[i] >= least) each(Token{held_[i], i});
  }
  // The first of the parts begin..end whose cumulative mass exceeds `target`; a part with mass even if rounding has made
  // `target` the total. Adds the mass of the parts before to `before`.
  template <typename MassOf>
  static int64_t part(int64_t begin, int64_t end, double target, double& before, MassOf mass_of) {
    int64_t found = begin;
    float held = 0;
    for (int64_t n = begin; n < end; n++) {
      const float mass = mass_of(n);
      if (mass == 0) continue;
      before += held, held = mass, found = n;
      if (before + held > target) break;
    }
    return found;
  }
  template <typename Predicate>
  void drop(Predicate predicate) {
    for (int64_t i = 0; i < V_; i++)
      if (predicate(Token{held_[i], i})) held_[i] = 0;
  }

  // Remove all tokens but the largest ones up to suffices(count, mass), at least one.
  template <typename Suffices>
  void cut(Suffices suffices) {
    for (const float least : {LIKELY, 0x1p-126f}) {
      bins_.assign(bin(1) + 1, {});
      for_each(least, [&](Token token) { bins_[bin(token.mass)].count++, bins_[bin(token.mass)].mass += token.mass; });
      int64_t count = 0;
      double mass = 0;
      for (int64_t b = bin(1); b >= bin(least); count += bins_[b].count, mass += bins_[b].mass, b--)
        if (bins_[b].count && suffices(count + bins_[b].count, mass + bins_[b].mass)) return cut_within(b, least, count, mass, suffices);
    }
  }
  // `cut` if the last token is in bin b, after `count` tokens of `mass` in higher bins.
  template <typename Suffices>
  void cut_within(int64_t b, float least, int64_t count, double mass, Suffices suffices) {
    own_.clear();
    for_each(least, [&](Token token) {
      if (bin(token.mass) == b) own_.push_back(token);
    });
    std::sort(own_.begin(), own_.end());
    size_t kept = 0;
    do count++, mass += own_[kept++].mass;
    while (kept < own_.size() && !suffices(count, mass));
    drop([&](Token token) { return own_[kept - 1] < token; });
  }

  const int64_t V_;
  Buffer<float> held_;
  std::vector<float> chunks_;
  std::vector<Bin> bins_;
  std::vector<Token> own_;
};

// As `uniforms` in kernels/sampling.py: the splitmix64 finalizer (doi:10.1145/2660193.2660195).
double uniform_of(uint64_t seed, uint64_t counter) {
  uint64_t mixed = seed + (counter + 1) * 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  return double((mixed ^ (mixed >> 31)) >> 11) * 0x1p-53;
}

template <typename T>
void sample_row(const Sample& a, int64_t b, Masses& masses) {
  const T* row = static_cast<const T*>(a.logits) + b * a.V;
  const int64_t at = a.rows ? a.rows[b] : b;
  const bool is_greedy = a.temperature[at] == 0;
  const float top = largest_of(row, a.V), inverse_temperature = is_greedy ? 1 : 1 / a.temperature[at];
  masses.take(row, top, inverse_temperature);
  double total = masses.total();
  a.tokens[b] = 0;
  a.logprobs[b] = NAN;
  if (!std::isfinite(total)) return;
  if (a.top_k) {
    masses.filter(a.top_k[at], a.top_p[at], a.min_p[at]);
    total = masses.total();
  }
  int64_t token = 0;
  if (is_greedy)
    while (to_float(row[token]) != top) token++;
  else
    token = masses.find((a.uniform ? a.uniform[b] : uniform_of(a.seed[at], a.num_tokens[at] - a.num_prompt_tokens[at] + a.offsets[b])) * total);
  a.tokens[b] = token;
  a.logprobs[b] = (to_float(row[token]) - top) * inverse_temperature - float(std::log(total));
}

template <typename T>
void top_row(const TopLogprobs& a, int64_t b, Masses& masses) {
  const T* row = static_cast<const T*>(a.logits) + b * a.V;
  int64_t* ids = a.ids + b * a.count;
  float* found = a.logprobs + b * a.count;  // the logits of `ids` so far
  const int64_t last = a.count - 1;
  int64_t size = 0;
  for (int64_t c = 0; c < a.V; c += LANES) {
    if (size > last && !any(load_some(row + c, a.V - c) > found[last])) continue;
    for (int64_t i = c; i < std::min(c + LANES, a.V); i++) {
      const float logit = to_float(row[i]);
      if (size > last && !(logit > found[last])) continue;
      int64_t place = size > last ? last : size++;
      for (; place > 0 && found[place - 1] < logit; place--) found[place] = found[place - 1], ids[place] = ids[place - 1];
      found[place] = logit, ids[place] = i;
    }
  }
  const float top = found[0], inverse_temperature = a.temperature[b] == 0 ? 1 : 1 / a.temperature[b];
  masses.take(row, top, inverse_temperature);
  const float normalizer = float(std::log(masses.total()));
  for (int64_t i = 0; i < a.count; i++) found[i] = (found[i] - top) * inverse_temperature - normalizer;
}

// each(b, masses) for all rows.
template <typename Arguments, typename Each>
void for_each_row(const Arguments& a, Each each) {
  const int64_t chunk = 1 + 4096 / a.V;  // rows of few tokens take less time than scheduling them
#pragma omp parallel num_threads(a.threads)
  {
    Masses masses(a.V);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t b = 0; b < a.B; b++) each(b, masses);
  }
}

// In double, where the products are exact, so that fused multiply-adds change nothing. A token may occur twice.
void penalize_row(const Penalties& a, int64_t r, std::vector<float>& penalized) {
  float* row = a.logits + a.entries[r] * a.V;
  const double repetition = a.repetition[r], presence = a.presence[r], frequency = a.frequency[r];
  for (int64_t i = 0, at = r * a.W; i < a.W; i++, at++) {
    const double given = row[a.tokens[at]], penalty = frequency * a.num_outputs[at] + (a.num_outputs[at] > 0 ? presence : 0);
    const double scaled = repetition == 1 ? given : given > 0 ? given / repetition : given * repetition;
    penalized[i] = float(scaled - penalty);
  }
  for (int64_t i = 0, at = r * a.W; i < a.W; i++, at++)
    if (a.is_valid[at]) row[a.tokens[at]] = penalized[i];
}

}  // namespace

extern "C" void penalize(const Penalties* a) {
#pragma omp parallel num_threads(a->n * a->W < 2048 ? 1 : a->threads)
  {
    std::vector<float> penalized(a->W);
#pragma omp for
    for (int64_t r = 0; r < a->n; r++) penalize_row(*a, r, penalized);
  }
}

extern "C" void apply_token_bitmask(const TokenBitmask* a) {
#pragma omp parallel for num_threads(a->n * a->V < 65536 ? 1 : a->threads)
  for (int64_t r = 0; r < a->n; r++)
    for (int64_t w = 0; w < a->W; w++) {
      const uint32_t allowed = a->bitmask[r * a->W + w];
      float* logits = a->logits + a->entries[r] * a->V + w * 32;
      const int count = int(std::min<int64_t>(32, a->V - w * 32));
#pragma omp simd
      for (int i = 0; i < count; i++) logits[i] = allowed >> i & 1 ? logits[i] : -INFINITY;
    }
}

extern "C" void sample(const Sample* a, int64_t is_bf16) {
  for_each_row(*a, [&](int64_t b, Masses& masses) { is_bf16 ? sample_row<bf16>(*a, b, masses) : sample_row<float>(*a, b, masses); });
}

extern "C" void top_logprobs(const TopLogprobs* a, int64_t is_bf16) {
  for_each_row(*a, [&](int64_t b, Masses& masses) { is_bf16 ? top_row<bf16>(*a, b, masses) : top_row<float>(*a, b, masses); });
}

LAYOUT(Sample, Sample,
       FIELD(logits) FIELD(rows) FIELD(temperature) FIELD(top_k) FIELD(top_p) FIELD(min_p) FIELD(uniform) FIELD(seed)
       FIELD(num_tokens) FIELD(num_prompt_tokens) FIELD(offsets) FIELD(tokens) FIELD(logprobs) FIELD(B) FIELD(V)
       FIELD(threads))

LAYOUT(TopLogprobs, TopLogprobs,
       FIELD(logits) FIELD(temperature) FIELD(ids) FIELD(logprobs) FIELD(B) FIELD(V) FIELD(count) FIELD(threads))

LAYOUT(Penalties, Penalties,
       FIELD(logits) FIELD(entries) FIELD(tokens) FIELD(num_outputs) FIELD(is_valid) FIELD(repetition) FIELD(presence)
       FIELD(frequency) FIELD(n) FIELD(W) FIELD(V) FIELD(threads))

LAYOUT(TokenBitmask, TokenBitmask, FIELD(logits) FIELD(entries) FIELD(bitmask) FIELD(n) FIELD(W) FIELD(V) FIELD(threads))
