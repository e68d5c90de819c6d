// The Python module: raw pointers in, the best kernels this processor has. Limited API, so one build serves every
// CPython from 3.10 on; no torch, so one build serves every torch. kernels/extension.py loads it, and the
// files beside it check what they pass.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "job.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#elif defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(_MSC_VER) && defined(RENORM_X86)
#include <immintrin.h>
#include <intrin.h>
#endif

using namespace renorm;

namespace {

const Kernels* kernels = &kernels_baseline;
bool forked = false;

// ---- what the processor has

#ifdef RENORM_X86
#if defined(_MSC_VER)
bool has(int leaf, int reg, int bit) {
    int info[4];
    __cpuidex(info, leaf, 0);
    return info[reg] >> bit & 1;
}
bool has_avx2() {
    bool saved = has(1, 2, 27) && (_xgetbv(0) & 6) == 6;
    return saved && has(1, 2, 12) && has(1, 2, 29) && has(7, 1, 5);
}
bool has_avx512() {
    bool saved = has_avx2() && (_xgetbv(0) & 0xe6) == 0xe6;
    return saved && has(7, 1, 16) && has(7, 1, 17) && has(7, 1, 30) && has(7, 1, 31);
}
#else
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#endif

// The widest there is, or where the environment's RENORM_ISA names a narrower one that. False for a name that there is
// not.
bool choose_kernels(const char* wanted) {
    bool known = !*wanted;
    for (const char* name : {"baseline", "avx2", "avx512"}) known = known || std::strcmp(wanted, name) == 0;
#ifdef RENORM_X86
    const Kernels* all[] = {&kernels_baseline, has_avx2() ? &kernels_avx2 : nullptr,
                            has_avx512() ? &kernels_avx512 : nullptr};
    for (const Kernels* some : all) {
        if (!some) continue;
        kernels = some;
        if (std::strcmp(wanted, some->name) == 0) break;
    }
#endif
    return known;
}

// Fresh memory comes in pages of 4 KiB, each of which costs a fault when it is first written: for a large output
// that takes longer than the kernel. Huge pages take 512 times fewer faults.
void want_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 2u << 20;
    if (!memory || bytes < int64_t(2 * page)) return;
    uintptr_t first = ((uintptr_t)memory + page - 1) / page * page, last = ((uintptr_t)memory + bytes) / page * page;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// ---- arguments

struct Arguments {
    PyObject* const* items;
    Py_ssize_t count, next = 0;
    bool ok;
    Arguments(PyObject* const* items, Py_ssize_t count, Py_ssize_t expected)
        : items(items), count(count), ok(count == expected) {
        if (!ok) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    }
    int64_t integer() {
        if (!ok) return 0;
        int64_t value = PyLong_AsLongLong(items[next++]);
        if (value == -1 && PyErr_Occurred()) ok = false;
        return value;
    }
    double real() {
        if (!ok) return 0;
        double value = PyFloat_AsDouble(items[next++]);
        if (value == -1 && PyErr_Occurred()) ok = false;
        return value;
    }
    template <class T = void>
    T* pointer() {
        if (!ok) return nullptr;
        void* value = PyLong_AsVoidPtr(items[next++]);
        if (!value && PyErr_Occurred()) ok = false;
        return static_cast<T*>(value);
    }
    void nest(Nest& out) {
        if (!ok) return;
        char* bytes;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(items[next++], &bytes, &size) != 0) {
            ok = false;
        } else if (size != Py_ssize_t(sizeof(Nest))) {
            PyErr_Format(PyExc_ValueError, "a nest has %zd bytes, got %zd", Py_ssize_t(sizeof(Nest)), size);
            ok = false;
        } else {
            std::memcpy(&out, bytes, sizeof(Nest));
        }
    }
    int threads() {  // after a fork the pool's threads are gone, and waiting for them would never end
        int64_t value = integer();
        return forked ? 1 : int(value);
    }
};

int64_t entries(const Nest& nest) {
    int64_t n = nest.r0 * nest.k1 * nest.r1;
    for (int64_t d = 0; d < nest.outer_dims; d++) n *= nest.outer_size[d];
    return n;
}
int64_t sets(const Nest& nest) { return entries(nest) / (nest.r0 * nest.r1 * nest.merge); }
int64_t item_size(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

template <class J>
PyObject* run(bool (*kernel)(const J&), const J& job, int64_t numel) {
    bool done;
    if (numel < 32768) {  // shorter than it takes to hand the interpreter over
        done = kernel(job);
    } else {
        PyThreadState* state = PyEval_SaveThread();
        done = kernel(job);
        PyEval_RestoreThread(state);
    }
    if (!done) return PyErr_NoMemory();
    Py_INCREF(Py_None);
    return Py_None;
}

// ---- functions

PyObject* py_forward(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 18);
    Job job = {};
    from.nest(job.nest);
    job.dtype = int(from.integer());
    job.param_dtype = int(from.integer());
    job.threads = from.threads();
    job.about_zero = int(from.integer());
    job.activation = int(from.integer());
    job.slope = from.real();
    job.eps = from.real();
    job.x = from.pointer();
    job.residual = from.pointer();
    job.sum = from.pointer();
    job.y = from.pointer();
    job.mask = from.pointer<uint8_t>();
    job.weight = from.pointer();
    job.bias = from.pointer();
    job.stats = from.pointer<double>();
    job.measured = int(from.integer());
    job.affine = from.pointer<double>();
    if (!from.ok) return nullptr;
    int64_t numel = entries(job.nest), bytes = numel * item_size(job.dtype);
    if (job.y != job.x) want_huge_pages(job.y, bytes);
    want_huge_pages(job.sum, bytes);
    if (job.stats) return run(kernels->forward, job, numel);
    void* own = std::malloc(size_t(4 * sets(job.nest)) * sizeof(double));  // nobody wants to see them
    if (!own) return PyErr_NoMemory();
    job.stats = static_cast<double*>(own);
    PyObject* result = run(kernels->forward, job, numel);
    std::free(own);
    return result;
}

PyObject* py_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 22);
    Job job = {};
    from.nest(job.nest);
    job.dtype = int(from.integer());
    job.param_dtype = int(from.integer());
    job.threads = from.threads();
    job.about_zero = int(from.integer());
    job.activation = int(from.integer());
    job.slope = from.real();
    job.eps = from.real();
    job.x = from.pointer();
    job.mask = from.pointer<uint8_t>();
    job.weight = from.pointer();
    job.bias = from.pointer();
    job.stats = from.pointer<double>();
    job.fixed = int(from.integer());
    job.affine = from.pointer<double>();
    job.dy = from.pointer();
    job.dsum = from.pointer();
    job.dx = from.pointer();
    job.sums = from.pointer<double>();
    job.combine = from.pointer<double>();
    job.dweight = from.pointer();
    job.dbias = from.pointer();
    if (!from.ok) return nullptr;
    int64_t numel = entries(job.nest);
    want_huge_pages(job.dx, numel * item_size(job.dtype));
    return run(kernels->backward, job, numel);
}

PyObject* py_local(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 16);
    LocalJob job = {};
    job.dtype = int(from.integer());
    job.threads = from.threads();
    job.batch = from.integer();
    job.channels = from.integer();
    job.positions = from.integer();
    job.batch_stride = from.integer();
    job.channel_stride = from.integer();
    job.position_stride = from.integer();
    job.before = from.integer();
    job.after = from.integer();
    job.alpha = from.real();
    job.beta = from.real();
    job.k = from.real();
    job.x = from.pointer();
    job.dy = from.pointer();
    job.out = from.pointer();
    if (!from.ok) return nullptr;
    int64_t numel = job.batch * job.channels * job.positions;
    want_huge_pages(job.out, numel * item_size(job.dtype));
    return run(kernels->local, job, numel);
}

PyObject* py_recurrent(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 30);
    RecurrentJob job = {};
    job.dtype = int(from.integer());
    job.threads = from.threads();
    job.cell = int(from.integer());
    job.steps = from.integer();
    job.rows = from.integer();
    job.hidden = from.integer();
    job.state = from.integer();
    job.table = from.pointer<int64_t>();
    job.eps = from.real();
    job.x = from.pointer();
    job.candidate_x = from.pointer();
    job.weight = from.pointer();
    job.norm_weight = from.pointer();
    job.norm_bias = from.pointer();
    job.cell_weight = from.pointer();
    job.cell_bias = from.pointer();
    job.projection = from.pointer();
    job.states = from.pointer();
    job.cells = from.pointer();
    job.pre = from.pointer();
    job.norms = from.pointer();
    job.raw = from.pointer();
    job.dy = from.pointer();
    job.dh = from.pointer();
    job.dc = from.pointer();
    job.dx = from.pointer();
    job.dcandidate_x = from.pointer();
    job.dpre = from.pointer();
    job.dstates = from.pointer();
    job.sums = from.pointer<double>();
    if (!from.ok) return nullptr;
    return run(kernels->recurrent, job, job.steps * job.rows * job.hidden * job.state);
}

template <class T>
bool move_running(int64_t num, const double* stats, double factor, bool unbiased, T* mean, T* var) {
    const double *m = stats, *v = stats + num, *n = stats + 2 * num;
    bool any = false;
    const double most = double(std::numeric_limits<T>::max());
    auto unbiased_of = [=](int64_t i) { return unbiased && n[i] > 1 ? v[i] * n[i] / (n[i] - 1) : v[i]; };
    for (int64_t i = 0; i < num; i++) {
        if (!(std::fabs(m[i]) <= most) || !(unbiased_of(i) <= most)) return false;  // nor is NaN
        any = any || n[i] > 0;
    }
    if (!any) return false;
    for (int64_t i = 0; i < num; i++) {
        if (n[i] > 0) mean[i] = T(factor * m[i] + (1 - factor) * double(mean[i]));
        if (n[i] > (unbiased ? 1 : 0)) var[i] = T(factor * unbiased_of(i) + (1 - factor) * double(var[i]));
    }
    return true;
}

// Moves running statistics, float32 or float64, towards those of a batch, unless these are not finite; counts it.
PyObject* py_track(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 8);
    int dtype = int(from.integer());
    int64_t num = from.integer();
    double* stats = from.pointer<double>();
    double momentum = from.real();  // negative: the average over all batches
    bool unbiased = from.integer() != 0;
    void* mean = from.pointer();
    void* var = from.pointer();
    int64_t* batches = from.pointer<int64_t>();
    if (!from.ok) return nullptr;
    double factor = momentum >= 0 ? momentum : 1.0 / double(*batches + 1);
    bool moved = dtype == kFloat64 ? move_running(num, stats, factor, unbiased, (double*)mean, (double*)var)
                                   : move_running(num, stats, factor, unbiased, (float*)mean, (float*)var);
    if (moved && batches) ++*batches;
    return PyBool_FromLong(moved);
}

// What torch's batch norm is about to move: kept here, and put back by `settle` where the batch was not finite.
thread_local struct Kept {
    char* memory = nullptr;
    size_t size = 0;
    ~Kept() { std::free(memory); }
} kept;

PyObject* py_guard(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 4);
    size_t bytes = size_t(item_size(int(from.integer())));
    bytes *= size_t(from.integer());
    void* mean = from.pointer();
    void* var = from.pointer();
    if (!from.ok) return nullptr;
    if (kept.size < 2 * bytes) {
        std::free(kept.memory);
        kept.memory = static_cast<char*>(std::malloc(2 * bytes));
        kept.size = kept.memory ? 2 * bytes : 0;
        if (!kept.memory) return PyErr_NoMemory();
    }
    std::memcpy(kept.memory, mean, bytes);
    std::memcpy(kept.memory + bytes, var, bytes);
    Py_INCREF(Py_None);
    return Py_None;
}

template <class T>
bool all_finite(int64_t num, const T* values) {
    for (int64_t i = 0; i < num; i++)
        if (!(values[i] - values[i] == 0)) return false;
    return true;
}

// Counts the batch if running statistics, float32 or float64, are finite, and puts back what `guard` kept if not.
PyObject* py_settle(PyObject*, PyObject* const* items, Py_ssize_t count) {
    Arguments from(items, count, 5);
    int dtype = int(from.integer());
    int64_t num = from.integer();
    void* mean = from.pointer();
    void* var = from.pointer();
    int64_t* batches = from.pointer<int64_t>();
    if (!from.ok) return nullptr;
    bool good = dtype == kFloat64 ? all_finite(num, (double*)mean) && all_finite(num, (double*)var)
                                  : all_finite(num, (float*)mean) && all_finite(num, (float*)var);
    size_t bytes = size_t(num * item_size(dtype));
    if (good) {
        if (batches) ++*batches;
    } else if (kept.size >= 2 * bytes) {
        std::memcpy(mean, kept.memory, bytes);
        std::memcpy(var, kept.memory + bytes, bytes);
    }
    return PyBool_FromLong(good);
}

PyMethodDef methods[] = {
    {"forward", (PyCFunction)(void (*)(void))py_forward, METH_FASTCALL, "Measure and apply; see struct Job."},
    {"backward", (PyCFunction)(void (*)(void))py_backward, METH_FASTCALL, "Gradients; see struct Job."},
    {"local", (PyCFunction)(void (*)(void))py_local, METH_FASTCALL, "Local response norm; see struct LocalJob."},
    {"recurrent", (PyCFunction)(void (*)(void))py_recurrent, METH_FASTCALL, "A recurrence; see struct RecurrentJob."},
    {"guard", (PyCFunction)(void (*)(void))py_guard, METH_FASTCALL, "Keep running statistics for `settle`."},
    {"settle", (PyCFunction)(void (*)(void))py_settle, METH_FASTCALL, "Count a batch, or put back what was kept."},
    {"track", (PyCFunction)(void (*)(void))py_track, METH_FASTCALL, "Move running statistics."},
    {nullptr, nullptr, 0, nullptr},
};

struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The kernels of csrc/.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native(void) {
    const char* wanted = std::getenv("RENORM_ISA");
    if (!choose_kernels(wanted ? wanted : "")) {
        PyErr_Format(PyExc_ImportError, "RENORM_ISA is one of baseline, avx2, avx512; got %s", wanted);
        return nullptr;
    }
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
    PyObject* module = PyModule_Create(&definition);
    if (!module) return nullptr;
#ifdef _OPENMP
    const int openmp = 1;
#else
    const int openmp = 0;
#endif
    // `interface` counts changes of the functions' arguments: extension.py refuses a build of another one.
    if (PyModule_AddIntConstant(module, "interface", 2) != 0 || PyModule_AddIntConstant(module, "openmp", openmp) != 0 ||
        PyModule_AddStringConstant(module, "instructions", kernels->name) != 0) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
