#include "paged.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

constexpr int KEYS = 16, V = KEYS / W;
#if defined(__AVX512F__)
constexpr int ROWS = 8, ACROSS = 4, WIDE = 4;  // rows of one score block; vectors of values, and 16s of keys, in registers with 3 or 4 rows
#else
constexpr int ROWS = 4, ACROSS = 2, WIDE = 2;
#endif
constexpr int OUT_ROWS = 4;
const float NONE = -__builtin_inff();

LP_INLINE long place(const KvCache& c, const int32_t* table, int position, int head) {  // in rows of head_dim numbers
  return (long(table[position / c.block]) * c.kv_heads + head) * c.block;
}

// ---- codecs: one row of numbers in, one row out. I8: n = (x - minimum) / scale in 0..255, I4: in 0..15, two to a byte.

LP_INLINE void span_of(const float* x, int n, int levels, float& scale, float& least) {
  float low = x[0], high = x[0];
  for (int i = 1; i < n; i++) { low = x[i] < low ? x[i] : low; high = x[i] > high ? x[i] : high; }
  uint16_t h = float_to_half((high - low) / float(levels)), z = float_to_half(low);
  scale = half_to_float(h);
  least = half_to_float(z);
}
LP_INLINE int nearest(float x, float scale, float least, int levels) {
  const float n = scale > 0 ? __builtin_rintf((x - least) / scale) : 0.0f;
  return n < 0 ? 0 : n > float(levels) ? levels : int(n);
}

void write(const KvCache& c, const int32_t* table, int position, int head, const float* k, const float* v) {
  const long at = place(c, table, position, head);
  const int token = position % c.block, d = c.head_dim, column = token % KEYS;
  const long key = at * d + long(token / KEYS) * d * KEYS + column, value = (at + token) * d;
  if (c.codec == KV_F32) {
    for (int i = 0; i < d; i++) static_cast<float*>(c.keys)[key + long(i) * KEYS] = k[i];
    memcpy(static_cast<float*>(c.values) + value, v, size_t(d) * 4);
  } else if (c.codec == KV_F16) {
    uint16_t* keys = static_cast<uint16_t*>(c.keys) + key;
    uint16_t* values = static_cast<uint16_t*>(c.values) + value;
    uint16_t part[W];
    int i = 0;
    for (; i + W <= d; i += W) {
      store_half(part, load(k + i));
      for (int j = 0; j < W; j++) keys[long(i + j) * KEYS] = part[j];
      store_half(values + i, load(v + i));
    }
    for (; i < d; i++) { keys[long(i) * KEYS] = float_to_half(k[i]); values[i] = float_to_half(v[i]); }
  } else {
    const int levels = c.codec == KV_I8 ? 255 : 15;
    for (int side = 0; side < 2; side++) {
      const float* x = side ? v : k;
      float scale, least;
      span_of(x, d, levels, scale, least);
      uint16_t* s = static_cast<uint16_t*>(side ? c.value_scales : c.key_scales) + (at + token) * 2;
      s[0] = float_to_half(scale);
      s[1] = float_to_half(least);
      uint8_t* bytes = static_cast<uint8_t*>(side ? c.values : c.keys);
      for (int i = 0; i < d; i++) {
        const int n = nearest(x[i], scale, least, levels);
        const long to = side ? value + i : key + long(i) * KEYS;  // number `to` of the area
        if (c.codec == KV_I8) bytes[to] = uint8_t(n);
        else bytes[to / 2] = uint8_t(to % 2 ? (bytes[to / 2] & 15) | n << 4 : (bytes[to / 2] & 0xf0) | n);
      }
    }
  }
}

LP_INLINE float stored(const KvCache& c, const void* area, long at) {
  const uint8_t* bytes = static_cast<const uint8_t*>(area);
  return float(c.codec == KV_I8 ? bytes[at] : at % 2 ? bytes[at / 2] >> 4 : bytes[at / 2] & 15);
}

// 16 numbers from number `at` (even) of an area of I8 or I4.
LP_INLINE void stored16(const KvCache& c, const void* area, long at, vf* to) {
#if defined(__AVX2__)
  const uint8_t* bytes = static_cast<const uint8_t*>(area);
  __m128i n;
  if (c.codec == KV_I8) n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + at));
  else {
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + at / 2)));
    n = _mm_or_si128(_mm_and_si128(pairs, _mm_set1_epi16(15)), _mm_slli_epi16(_mm_and_si128(pairs, _mm_set1_epi16(0xf0)), 4));
  }
#if defined(__AVX512F__)
  to[0] = to_float(_mm512_cvtepu8_epi32(n));
#else
  to[0] = to_float(_mm256_cvtepu8_epi32(n));
  to[1] = to_float(_mm256_cvtepu8_epi32(_mm_srli_si128(n, 8)));
#endif
#else
  for (int v = 0; v < V; v++) for (int j = 0; j < W; j++) to[v][j] = stored(c, area, at + v * W + j);
#endif
}

LP_INLINE int bits_of(const KvCache& c) { return c.codec == KV_F32 ? 32 : c.codec == KV_F16 ? 16 : c.codec == KV_I8 ? 8 : 4; }

// Where the keys (or values) of the 16 tokens from `position` on lie, in one piece.
LP_INLINE const char* piece(const PagedTask& t, const void* area, int position, int head) {
  const KvCache& c = *t.cache;
  const long numbers = (place(c, t.table, position, head) + position % c.block / KEYS * KEYS) * c.head_dim;
  return static_cast<const char*>(area) + numbers * bits_of(c) / 8;
}

// 16 keys from `position` on as [head_dim][16]: where they lie, or decoded and rotated into `to`.
const float* keys_of(const PagedTask& t, int position, float* to) {
  const KvCache& c = *t.cache;
  const int d = c.head_dim, token = position % c.block;
  const long at = place(c, t.table, position, t.kv_head), key = at * d + long(token / KEYS) * d * KEYS;
  const bool rotate = t.options->cos != nullptr;
  if (c.codec == KV_F32 && !rotate) return static_cast<const float*>(c.keys) + key;
  if (c.codec == KV_F32) memcpy(to, static_cast<const float*>(c.keys) + key, size_t(d) * KEYS * 4);
  else if (c.codec == KV_F16) for (int i = 0; i < d * V; i++) store(to + i * W, load_half(static_cast<const uint16_t*>(c.keys) + key + i * W));
  else {
    const uint16_t* s = static_cast<const uint16_t*>(c.key_scales) + (at + token) * 2;
    float scale[KEYS], least[KEYS];
    for (int j = 0; j < KEYS; j++) { scale[j] = half_to_float(s[2 * j]); least[j] = half_to_float(s[2 * j + 1]); }
    for (int i = 0; i < d; i++) {
      vf n[V];
      stored16(c, c.keys, key + long(i) * KEYS, n);
      for (int v = 0; v < V; v++) store(to + i * KEYS + v * W, fma(n[v], load(scale + v * W), load(least + v * W)));
    }
  }
  if (!rotate) return to;
  const int half = d / 2;
  const float* cos = t.options->cos + long(position / KEYS) * half * KEYS;
  const float* sin = t.options->sin + long(position / KEYS) * half * KEYS;
  for (int i = 0; i < half * KEYS; i += W) {
    const vf a = load(to + i), b = load(to + half * KEYS + i), c1 = load(cos + i), s1 = load(sin + i);
    store(to + i, fma(-b, s1, a * c1));
    store(to + half * KEYS + i, fma(a, s1, b * c1));
  }
  return to;
}

// Values of `count` tokens (at most 16, of one block) from `position` on as [count][head_dim].
const float* values_of(const PagedTask& t, int position, int count, float* to) {
  const KvCache& c = *t.cache;
  const int d = c.head_dim, token = position % c.block;
  const long row = place(c, t.table, position, t.kv_head) + token;
  if (c.codec == KV_F32) return static_cast<const float*>(c.values) + row * d;
  if (c.codec == KV_F16) {
    const uint16_t* from = static_cast<const uint16_t*>(c.values) + row * d;
    int i = 0;
    for (; i + W <= count * d; i += W) store(to + i, load_half(from + i));
    for (; i < count * d; i++) to[i] = half_to_float(from[i]);
    return to;
  }
  for (int j = 0; j < count; j++) {
    const uint16_t* s = static_cast<const uint16_t*>(c.value_scales) + (row + j) * 2;
    const float scale = half_to_float(s[0]), least = half_to_float(s[1]);
    int i = 0;
    for (; i + KEYS <= d && (row + j) * d % 2 == 0; i += KEYS) {
      vf n[V];
      stored16(c, c.values, (row + j) * d + i, n);
      for (int v = 0; v < V; v++) store(to + j * d + i + v * W, fma(n[v], set1(scale), set1(least)));
    }
    for (; i < d; i++) to[j * d + i] = stored(c, c.values, (row + j) * d + i) * scale + least;
  }
  return to;
}

// ---- scores of MR rows with 16 keys, and MR rows of probabilities times values, from numbers of type T: float, or the halves of the cache
// where they are read once (few rows). What is wanted next is asked for line by line in between: all at once would wait for each other.

struct Pieces {  // of one tile, 16 tokens each
  const void* at[KEY_TILE / KEYS];
  const char* soon[KEY_TILE / KEYS];
};

LP_INLINE vf wide(const float* p) { return load(p); }
LP_INLINE vf wide(const uint16_t* p) { return load_half(p); }
LP_INLINE float single(float x) { return x; }
LP_INLINE float single(uint16_t h) { return half_to_float(h); }

template <int MR, int KT, class T>  // KT times 16 keys: with few rows one alone would wait for its own sums
LP_INLINE void score(const float* q, const Pieces& keys, int g, float* s, int d) {
  constexpr int EACH = KEYS * int(sizeof(T)), LINE = EACH < 64 ? 64 / EACH : 1;  // bytes of one dimension; dimensions to a cache line
  vf acc[MR][KT * V];
  const T* from[KT];
  for (int i = 0; i < KT; i++) from[i] = static_cast<const T*>(keys.at[g + i]);
  for (int i = 0; i < MR; i++) for (int v = 0; v < KT * V; v++) acc[i][v] = zero();
  for (int k = 0; k < d; k++) {
    if (k % LINE == 0) for (int i = 0; i < KT; i++) __builtin_prefetch(keys.soon[g + i] + k * EACH);
    for (int v = 0; v < KT * V; v++) {
      const vf key = wide(from[v / V] + k * KEYS + v % V * W);
      for (int i = 0; i < MR; i++) acc[i][v] = fma(set1(q[i * d + k]), key, acc[i][v]);
    }
  }
  for (int i = 0; i < MR; i++) for (int v = 0; v < KT * V; v++) store(s + i * KEY_TILE + (g * V + v) * W, acc[i][v]);
}

template <int KT, class T>
void scores(const float* q, const Pieces& keys, int first, float* s, int rows, int d) {
  constexpr int STEP = KT < WIDE ? KT : WIDE;
  int r = 0;
  for (; r + ROWS <= rows; r += ROWS) for (int g = 0; g < KT; g++) score<ROWS, 1, T>(q + r * d, keys, first + g, s + r * KEY_TILE, d);
  for (; r + 3 <= rows; r += 3) for (int g = 0; g < KT; g += STEP) score<3, STEP, T>(q + r * d, keys, first + g, s + r * KEY_TILE, d);
  for (; r < rows; r++) score<1, KT, T>(q + r * d, keys, first, s + r * KEY_TILE, d);
}

template <int MR, int NV, class T>
LP_INLINE void weigh(const float* p, const Pieces& values, int column, float* o, int count, int d) {
  vf acc[MR][NV];
  for (int i = 0; i < MR; i++) for (int v = 0; v < NV; v++) acc[i][v] = load(o + i * d + column + v * W);
  for (int first = 0; first < count; first += KEYS) {
    const T* from = static_cast<const T*>(values.at[first / KEYS]) + column;
    const char* soon = values.soon[first / KEYS];
    const int here = count - first < KEYS ? count - first : KEYS;
    for (int t = 0; t < here; t++, from += d) {
      if (column == 0) for (int b = 0; b < d * int(sizeof(T)); b += 64) __builtin_prefetch(soon + t * d * int(sizeof(T)) + b);
      vf value[NV];
      for (int v = 0; v < NV; v++) value[v] = wide(from + v * W);
      for (int i = 0; i < MR; i++) {
        const vf a = set1(p[i * KEY_TILE + first + t]);
        for (int v = 0; v < NV; v++) acc[i][v] = fma(a, value[v], acc[i][v]);
      }
    }
  }
  for (int i = 0; i < MR; i++) for (int v = 0; v < NV; v++) store(o + i * d + column + v * W, acc[i][v]);
}

template <int MR, class T>
LP_INLINE void weigh_rows(const float* p, const Pieces& values, float* o, int count, int d) {
  int c = 0;
  for (; c + ACROSS * W <= d; c += ACROSS * W) weigh<MR, ACROSS, T>(p, values, c, o, count, d);
  for (; c + W <= d; c += W) weigh<MR, 1, T>(p, values, c, o, count, d);
  for (; c < d; c++)
    for (int i = 0; i < MR; i++)
      for (int t = 0; t < count; t++)
        o[i * d + c] += p[i * KEY_TILE + t] * single(static_cast<const T*>(values.at[t / KEYS])[long(t % KEYS) * d + c]);
}

template <class T>
void weighted(const float* p, const Pieces& values, float* o, int rows, int count, int d) {
  int r = 0;
  for (; r + OUT_ROWS <= rows; r += OUT_ROWS) weigh_rows<OUT_ROWS, T>(p + r * KEY_TILE, values, o + r * d, count, d);
  for (; r + 3 <= rows; r += 3) weigh_rows<3, T>(p + r * KEY_TILE, values, o + r * d, count, d);
  for (; r < rows; r++) weigh_rows<1, T>(p + r * KEY_TILE, values, o + r * d, count, d);
}

// What a row may not see becomes -inf: keys from `limit` or `last` on, and with a window those before it that are no sinks.
LP_INLINE void hide(const PagedOptions& o, float* s, int first, int last, int limit) {
  const int end = limit < last ? limit : last;
  for (int j = end > first ? end - first : 0; j < KEY_TILE; j++) s[j] = NONE;
  if (o.window && limit - o.window > first)
    for (int j = 0; j < KEY_TILE && first + j < limit - o.window; j++) if (first + j >= o.sinks) s[j] = NONE;
}

LP_INLINE bool all_hidden(const PagedTask& t, int first) {  // for every row: rows are in rising order of their limits
  const int window = t.options->window;
  if (first >= t.limit[t.rows - 1]) return true;
  return window && first + KEY_TILE <= t.limit[0] - window && first >= t.options->sinks;
}

LP_INLINE bool halves(const PagedTask& t) { return t.cache->codec == KV_F16 && t.rows <= OUT_ROWS; }  // widened once, where they are used

template <class T>
void all_scores(const float* q, const Pieces& keys, int groups, float* s, int rows, int d) {
  if (groups == 4) return scores<4, T>(q, keys, 0, s, rows, d);
  if (groups > 1) scores<2, T>(q, keys, 0, s, rows, d);
  if (groups % 2) scores<1, T>(q, keys, groups - 1, s, rows, d);
}

void fill_scores(const PagedTask& t, int first, int last, float* s, float* scratch) {
  const int d = t.cache->head_dim, groups = last - first >= KEY_TILE ? KEY_TILE / KEYS : (last - first + KEYS - 1) / KEYS;
  const bool raw = halves(t) && !t.options->cos;
  Pieces keys;
  for (int g = 0; g < groups; g++) {
    const int position = first + g * KEYS;
    keys.at[g] = raw ? static_cast<const void*>(piece(t, t.cache->keys, position, t.kv_head)) : keys_of(t, position, scratch + g * KEYS * d);
    keys.soon[g] = piece(t, t.cache->values, position, t.kv_head);
  }
  if (raw) all_scores<uint16_t>(t.q, keys, groups, s, t.rows, d);
  else all_scores<float>(t.q, keys, groups, s, t.rows, d);
  for (int r = 0; r < t.rows; r++) hide(*t.options, s + r * KEY_TILE, first, last, t.limit[r]);
}

void segment(const PagedTask& t, int first, int last) {
  const int d = t.cache->head_dim;
  float* s = t.scratch;
  float* scratch = s + t.rows * KEY_TILE;  // keys, then values
  for (int r = 0; r < t.rows; r++) { t.m[r] = NONE; t.l[r] = 0; }
  memset(t.o, 0, size_t(t.rows) * size_t(d) * 4);
  for (int tile = first; tile < last; tile += KEY_TILE) {
    if (all_hidden(t, tile)) continue;
    fill_scores(t, tile, last, s, scratch);
    for (int r = 0; r < t.rows; r++) {
      float* row = s + r * KEY_TILE;
      vf most = set1(NONE);
      for (int j = 0; j < KEY_TILE; j += W) most = max(most, load(row + j));
      const float top = hmax(most), m = t.m[r] > top ? t.m[r] : top;
      if (m == NONE) { memset(row, 0, KEY_TILE * 4); continue; }
      vf total = zero();
      for (int j = 0; j < KEY_TILE; j += W) { const vf p = exp(load(row + j) - set1(m)); total = total + p; store(row + j, p); }
      if (m > t.m[r]) {  // the earlier tiles were weighed with a smaller maximum
        float shrink[W];
        store(shrink, exp(set1(t.m[r] - m)));
        t.l[r] *= shrink[0];
        int c = 0;
        for (; c + W <= d; c += W) store(t.o + r * d + c, load(t.o + r * d + c) * set1(shrink[0]));
        for (; c < d; c++) t.o[r * d + c] *= shrink[0];
        t.m[r] = m;
      }
      t.l[r] += sum(total);
    }
    const int count = last - tile < KEY_TILE ? last - tile : KEY_TILE;
    const bool raw = halves(t);
    Pieces values;
    for (int k = 0; k < count; k += KEYS) {
      const char* here = piece(t, t.cache->values, tile + k, t.kv_head);
      const int most = count - k < KEYS ? count - k : KEYS;
      values.at[k / KEYS] = raw ? static_cast<const void*>(here) : values_of(t, tile + k, most, scratch + k * d);
      values.soon[k / KEYS] = tile + k + KEY_TILE < last ? piece(t, t.cache->keys, tile + k + KEY_TILE, t.kv_head)
          : t.next_head >= 0 && k < t.limit[0] ? piece(t, t.cache->keys, k, t.next_head) : here;
    }
    if (raw) weighted<uint16_t>(s, values, t.o, t.rows, count, d);
    else weighted<float>(s, values, t.o, t.rows, count, d);
  }
}

void mass(const PagedTask& t, int first, int last, float* mass) {
  float* s = t.scratch;
  for (int tile = first; tile < last; tile += KEY_TILE) {
    if (all_hidden(t, tile)) continue;
    fill_scores(t, tile, last, s, s + t.rows * KEY_TILE);
    for (int r = 0; r < t.rows; r++) {
      if (t.l[r] == 0) continue;
      float* row = s + r * KEY_TILE;
      for (int j = 0; j < KEY_TILE; j += W) store(row + j, exp(load(row + j) - set1(t.m[r])) * set1(1.0f / t.l[r]));
      for (int j = 0; j < KEY_TILE && tile + j < last; j++) mass[tile + j] += row[j];
    }
  }
}

void merge(float* m, float* l, float* o, const float* m2, const float* l2, const float* o2, int rows, int d) {
  for (int r = 0; r < rows; r++, o += d, o2 += d) {
    if (l2[r] == 0) continue;
    const float top = m[r] > m2[r] ? m[r] : m2[r];
    float a[W], b[W];
    store(a, exp(set1(m[r] - top)));
    store(b, exp(set1(m2[r] - top)));
    const float ours = l[r] == 0 ? 0.0f : a[0], theirs = b[0];
    l[r] = l[r] * ours + l2[r] * theirs;
    m[r] = top;
    int c = 0;
    for (; c + W <= d; c += W) store(o + c, fma(load(o + c), set1(ours), load(o2 + c) * set1(theirs)));
    for (; c < d; c++) o[c] = o[c] * ours + o2[c] * theirs;
  }
}

void finish(const float* l, const float* o, float* to, int d) {
  const float inverse = *l == 0 ? 0.0f : 1.0f / *l;
  int c = 0;
  for (; c + W <= d; c += W) store(to + c, load(o + c) * set1(inverse));
  for (; c < d; c++) to[c] = o[c] * inverse;
}

void scale(const float* q, float by, float* to, int d) {
  for (int c = 0; c < d; c++) to[c] = q[c] * by;
}

}}  // namespace LILLIPUT_ISA

extern const PagedKernels LILLIPUT_TABLE(paged) = {LILLIPUT_ISA::write, LILLIPUT_ISA::segment, LILLIPUT_ISA::mass, LILLIPUT_ISA::merge, LILLIPUT_ISA::finish,
                                                   LILLIPUT_ISA::scale};

}  // namespace lilliput
