// Vectors of the width this translation unit is compiled for, and the dtypes that are loaded into them.
//
// Included inside `namespace renorm { namespace RENORM_ISA {`: every instruction set has its own copy, so that the
// linker cannot put a function compiled for a newer processor where an older one will run it.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// What entries of a dtype are computed in.
template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Acc = typename AccumulatorOf<T>::type;

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bf16 value) { return float_of(uint32_t(value.bits) << 16); }
inline float widen(f16 value) {
    uint32_t magnitude = value.bits & 0x7fffu;
    // Exponent bias 15 -> 127; a subnormal half by no subnormal float, which threads may be told to flush.
    uint32_t bits = magnitude < 0x400u ? bits_of(float(magnitude) * float_of((127 - 24) << 23))
                                       : (magnitude << 13) + (112u << 23);
    if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude << 13);
    return float_of(bits | uint32_t(value.bits & 0x8000u) << 16);
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, bf16& out) {
    uint32_t bits = bits_of(value);
    out.bits = value != value ? uint16_t(bits >> 16 | 0x40u) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float value, f16& out) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000u, magnitude = bits_of(value) & 0x7fffffffu, half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 65536 and more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // a subnormal half: adding 0.5 rounds at 2^-24
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    }
    out.bits = uint16_t(sign | half);
}

#if defined(__GNUC__) && !defined(RENORM_PLAIN_LANES)
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kBytes)));
    typedef int32_t ints __attribute__((vector_size(kBytes)));
    typedef uint8_t bytes __attribute__((vector_size(kBytes / 4)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kBytes)));
    typedef int64_t ints __attribute__((vector_size(kBytes)));
    typedef uint8_t bytes __attribute__((vector_size(kBytes / 8)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using Ints = typename VectorOf<A>::ints;
template <class A>
constexpr int kLanes = int(kBytes / sizeof(A));

template <class A>
inline Vec<A> splat(A value) {
    return Vec<A>{} + value;
}
template <class A>
inline Vec<A> choose(Ints<A> condition, Vec<A> yes, Vec<A> no) {
    return condition ? yes : no;
}
template <class A>
inline Vec<A> keep(const uint8_t* mask, Vec<A> yes, Vec<A> no) {  // by a byte for each lane
    typename VectorOf<A>::bytes bytes;
    std::memcpy(&bytes, mask, sizeof bytes);
    return choose<A>(__builtin_convertvector(bytes, Ints<A>) != 0, yes, no);
}
#else
// Compilers without vector types (MSVC): arrays, which the optimizer may vectorize.
template <class A>
constexpr int kLanes = int(kBytes / sizeof(A));
template <class A>
struct Vec {
    A lane[kBytes / sizeof(A)];
    A operator[](int i) const { return lane[i]; }
};
template <class A>
struct Ints {
    bool lane[kBytes / sizeof(A)];
};
#define RENORM_OPERATOR(op)                                                       \
    template <class A>                                                            \
    inline Vec<A> operator op(Vec<A> a, Vec<A> b) {                               \
        for (int i = 0; i < kLanes<A>; i++) a.lane[i] = a.lane[i] op b.lane[i];   \
        return a;                                                                 \
    }                                                                             \
    template <class A>                                                            \
    inline Vec<A>& operator op##=(Vec<A>& a, Vec<A> b) {                          \
        return a = a op b;                                                        \
    }
RENORM_OPERATOR(+)
RENORM_OPERATOR(-)
RENORM_OPERATOR(*)
RENORM_OPERATOR(/)
template <class A>
inline Vec<A> splat(A value) {
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; i++) v.lane[i] = value;
    return v;
}
template <class A>
inline Ints<A> operator<(Vec<A> a, Vec<A> b) {
    Ints<A> m;
    for (int i = 0; i < kLanes<A>; i++) m.lane[i] = a.lane[i] < b.lane[i];
    return m;
}
template <class A>
inline Vec<A> choose(Ints<A> condition, Vec<A> yes, Vec<A> no) {
    for (int i = 0; i < kLanes<A>; i++) yes.lane[i] = condition.lane[i] ? yes.lane[i] : no.lane[i];
    return yes;
}
template <class A>
inline Vec<A> keep(const uint8_t* mask, Vec<A> yes, Vec<A> no) {
    for (int i = 0; i < kLanes<A>; i++) yes.lane[i] = mask[i] ? yes.lane[i] : no.lane[i];
    return yes;
}
#endif

template <class A>
inline A total(Vec<A> v) {  // pairwise
    A part[kLanes<A>];
    std::memcpy(part, &v, sizeof part);
    for (int half = kLanes<A> / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

#if defined(__AVX512F__) && !defined(RENORM_PLAIN_LANES)
template <>
inline float total<float>(Vec<float> v) {
    return _mm512_reduce_add_ps(v);
}
template <>
inline double total<double>(Vec<double> v) {
    return _mm512_reduce_add_pd(v);
}
#endif

// Load and store one vector of entries of any dtype.
template <class A, class T>
inline Vec<A> load(const T* p) {
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = widen(p[i]);
    Vec<A> v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
}
template <>
inline Vec<float> load<float, float>(const float* p) {
    Vec<float> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <>
inline Vec<double> load<double, double>(const double* p) {
    Vec<double> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class A, class T>
inline void store(T* p, Vec<A> v) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < kLanes<A>; i++) narrow(lanes[i], p[i]);
}
template <>
inline void store<float, float>(float* p, Vec<float> v) {
    std::memcpy(p, &v, sizeof v);
}
template <>
inline void store<double, double>(double* p, Vec<double> v) {
    std::memcpy(p, &v, sizeof v);
}

#if defined(__GNUC__) && !defined(RENORM_PLAIN_LANES)
typedef uint16_t Shorts __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
template <>
inline Vec<float> load<float, bf16>(const bf16* p) {
    Shorts shorts;
    std::memcpy(&shorts, p, sizeof shorts);
    return (Vec<float>)(__builtin_convertvector(shorts, Words) << 16);
}
template <>
inline void store<float, bf16>(bf16* p, Vec<float> v) {
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    Words quiet = bits >> 16 | 0x40u;
    Shorts shorts = __builtin_convertvector(v != v ? quiet : rounded, Shorts);
    std::memcpy(p, &shorts, sizeof shorts);
}
#if defined(__AVX512F__)
template <>
inline Vec<float> load<float, f16>(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
template <>
inline void store<float, f16>(f16* p, Vec<float> v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
template <>
inline Vec<float> load<float, f16>(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
template <>
inline void store<float, f16>(f16* p, Vec<float> v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
typedef __fp16 Halves __attribute__((vector_size(8)));
template <>
inline Vec<float> load<float, f16>(const f16* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, Vec<float>);
}
template <>
inline void store<float, f16>(f16* p, Vec<float> v) {
    Halves halves = __builtin_convertvector(v, Halves);
    std::memcpy(p, &halves, sizeof halves);
}
#endif
#endif

// The first n lanes; the others are `fill`.
template <class A, class T>
inline Vec<A> load_part(const T* p, int64_t n, A fill) {
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = i < n ? widen(p[i]) : fill;
    Vec<A> v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
}
template <class A, class T>
inline void store_part(T* p, int64_t n, Vec<A> v) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < n; i++) narrow(lanes[i], p[i]);
}
#if defined(__AVX512F__) && !defined(RENORM_PLAIN_LANES)
template <>
inline Vec<float> load_part<float, float>(const float* p, int64_t n, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
}
template <>
inline void store_part<float, float>(float* p, int64_t n, Vec<float> v) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
}
template <>
inline Vec<float> load_part<float, bf16>(const bf16* p, int64_t n, float fill) {
    __mmask16 some = __mmask16((1u << n) - 1);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), some, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}
#endif

// Mask bytes of the first n lanes, 0 beyond them.
struct MaskPart {
    uint8_t byte[kBytes / 4];
    MaskPart(const uint8_t* mask, int64_t n) {
        for (int i = 0; i < kBytes / 4; i++) byte[i] = i < n ? mask[i] : uint8_t(0);
    }
};

// Asks for memory that the next panel reads, while this one is written. Past the end it does nothing.
RENORM_ALWAYS inline void prefetch(const void* p) {  // GCC takes a call of it for one without effect
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 3);
#else
    (void)p;
#endif
}
