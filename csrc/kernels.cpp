// The kernels of one instruction set: compiled once for each, with RENORM_ISA as the namespace.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "job.h"

#if defined(__GNUC__)
#define RENORM_INLINE __attribute__((always_inline))  // after a lambda's parameters
#define RENORM_ALWAYS __attribute__((always_inline))  // before a function
#elif defined(_MSC_VER)
#define RENORM_INLINE
#define RENORM_ALWAYS __forceinline
#else
#define RENORM_INLINE
#define RENORM_ALWAYS
#endif

namespace renorm {
namespace RENORM_ISA {

#include "simd.h"
#include "activations.h"
#include "runs.h"
#include "driver.h"
#include "rows.h"
#include "columns.h"
#include "local.h"
#include "recurrent.h"

template <class T>
bool forward_as(const Job& job) {
    return job.nest.r1 > 1 || job.nest.k1 == 1 ? row_forward<T>(job) : column_forward<T>(job);
}
template <class T>
bool backward_as(const Job& job) {
    return job.nest.r1 > 1 || job.nest.k1 == 1 ? row_backward<T>(job) : column_backward<T>(job);
}

static bool forward(const Job& job) {
    switch (job.dtype) {
        case kFloat32: return forward_as<float>(job);
        case kFloat64: return forward_as<double>(job);
        case kBFloat16: return forward_as<bf16>(job);
        default: return forward_as<f16>(job);
    }
}
static bool backward(const Job& job) {
    switch (job.dtype) {
        case kFloat32: return backward_as<float>(job);
        case kFloat64: return backward_as<double>(job);
        case kBFloat16: return backward_as<bf16>(job);
        default: return backward_as<f16>(job);
    }
}

}  // namespace RENORM_ISA

#define RENORM_TEXT_(x) #x
#define RENORM_TEXT(x) RENORM_TEXT_(x)
#define RENORM_JOIN_(a, b) a##b
#define RENORM_JOIN(a, b) RENORM_JOIN_(a, b)
extern const Kernels RENORM_JOIN(kernels_, RENORM_ISA) = {
    RENORM_TEXT(RENORM_ISA), RENORM_ISA::forward, RENORM_ISA::backward, RENORM_ISA::local,
    RENORM_ISA::recurrent};

}  // namespace renorm
