// What is done to one contiguous run of entries: the innermost loops of the kernels.
//
// *Row* functions see a run that belongs to one cell. *Column* functions see `rows` runs with one cell for each
// entry, and tables with a number for each. Masks are null or one byte for each entry. Each function is compiled
// twice: `Plain` has neither mask nor activation, whose code would take registers from the usual case.

struct Whole {};
struct Part {
    int64_t n;
};

template <class A, class T>
inline Vec<A> get(Whole, const T* p, A) {
    return load<A>(p);
}
template <class A, class T>
inline Vec<A> get(Part part, const T* p, A fill) {
    return load_part<A>(p, part.n, fill);
}
template <class A, class T>
inline void put(Whole, T* p, Vec<A> v) {
    store<A>(p, v);
}
template <class A, class T>
inline void put(Part part, T* p, Vec<A> v) {
    store_part<A>(p, part.n, v);
}
template <class A>
inline Vec<A> real(Whole, const uint8_t* mask, Vec<A> v, A other) {
    return mask ? keep<A>(mask, v, splat(other)) : v;
}
template <class A>
inline Vec<A> real(Part part, const uint8_t* mask, Vec<A> v, A other) {
    return mask ? keep<A>(MaskPart(mask, part.n).byte, v, splat(other)) : v;
}

// f(i, u, whole or part) over n entries, in vectors; u = 0..3 in turn, for independent accumulators.
template <class A, class F>
RENORM_ALWAYS inline void each(int64_t n, F f) {
    constexpr int w = kLanes<A>;
    int64_t i = 0;
    for (; i + 4 * w <= n; i += 4 * w) {
        f(i, 0, Whole{});
        f(i + w, 1, Whole{});
        f(i + 2 * w, 2, Whole{});
        f(i + 3 * w, 3, Whole{});
    }
    for (; i + w <= n; i += w) f(i, 0, Whole{});
    if (i < n) f(i, 0, Part{n - i});
}

constexpr int64_t kStreamAhead = 2048;  // bytes from what is read to what is prefetched

template <int K>
struct Count {
    static constexpr int value = K;
};

template <class A>
struct Four {
    Vec<A> v[4];
    Four() {
        for (int u = 0; u < 4; u++) v[u] = splat(A(0));
    }
    RENORM_ALWAYS A sum() const { return total<A>((v[0] + v[1]) + (v[2] + v[3])); }
};

inline int64_t count_real(const uint8_t* mask, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += mask[i] != 0;
    return count;
}

// ---- rows

template <bool Plain, class T, class A>
A row_total(const T* x, int64_t n, const uint8_t* mask) {
    if (Plain) mask = nullptr;
    Four<A> s;
    each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
        s.v[u] += real<A>(span, mask ? mask + i : mask, get<A>(span, x + i, A(0)), A(0));
    });
    return s.sum();
}

template <bool Plain, class T, class A>
void row_moments(const T* x, int64_t n, const uint8_t* mask, A shift, A& s_out, A& q_out) {
    if (Plain) mask = nullptr;
    Four<A> s, q;
    Vec<A> center = splat(shift);
    each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
        Vec<A> d = real<A>(span, mask ? mask + i : mask, get<A>(span, x + i, shift) - center, A(0));
        s.v[u] += d;
        q.v[u] += d * d;
    });
    s_out = s.sum();
    q_out = q.sum();
}

// y = act((x - c) a + b)
template <class A>
struct Line {
    A c, a, b;
};

template <bool Plain, class T, class A>
void row_apply(const T* x, T* y, int64_t n, int64_t ahead, const uint8_t* mask, Line<A> line, Act<A> act) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        prefetch(x + i + ahead);
        Vec<A> z = (get<A>(span, x + i, A(0)) - c) * a + b;
        if (act.kind) z = activate(act, z);
        put<A>(span, y + i, real<A>(span, mask ? mask + i : mask, z, A(0)));
    });
}

// y = act(((x - c) a + b) w + v), w and v along the run
template <bool Plain, class T, class A>
void row_apply_along(const T* x, T* y, int64_t n, int64_t ahead, const uint8_t* mask, Line<A> line, const A* w, const A* v, Act<A> act) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        prefetch(x + i + ahead);
        Vec<A> z = ((get<A>(span, x + i, A(0)) - c) * a + b) * get<A>(span, w + i, A(0)) + get<A>(span, v + i, A(0));
        if (act.kind) z = activate(act, z);
        put<A>(span, y + i, real<A>(span, mask ? mask + i : mask, z, A(0)));
    });
}

template <class T, class A>
void row_add(const T* x, const T* residual, T* sum, int64_t n) {
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        put<A>(span, sum + i, get<A>(span, x + i, A(0)) + get<A>(span, residual + i, A(0)));
    });
}

// Sums of g and g (x - c), g = dy act'(z)
template <bool Plain, class T, class A>
void row_reduce(const T* x, const T* dy, int64_t n, const uint8_t* mask, Line<A> line, Act<A> act, A& g1, A& g2) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    Four<A> s, q;
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
        const uint8_t* m = mask ? mask + i : mask;
        Vec<A> d = real<A>(span, m, get<A>(span, x + i, line.c) - c, A(0));
        Vec<A> g = real<A>(span, m, get<A>(span, dy + i, A(0)), A(0));
        if (act.kind) g = g * derivative(act, d * a + b);
        s.v[u] += g;
        q.v[u] += g * d;
    });
    g1 = s.sum();
    g2 = q.sum();
}

// dx = A g + B (x - c) + D (+ dsum)
template <class A>
struct Combine {
    A a, b, d;
};

template <bool Plain, class T, class A>
void row_combine(const T* x, const T* dy, const T* dsum, T* dx, int64_t n, int64_t ahead, const uint8_t* mask, Line<A> line,
                 Combine<A> by, Act<A> act) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    Vec<A> A1 = splat(by.a), B = splat(by.b), D = splat(by.d);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        prefetch(x + i + ahead);
        prefetch(dy + i + ahead);
        Vec<A> d = get<A>(span, x + i, A(0)) - c;
        Vec<A> g = get<A>(span, dy + i, A(0));
        if (act.kind) g = g * derivative(act, d * a + b);
        Vec<A> v = real<A>(span, mask ? mask + i : mask, A1 * g + (B * d + D), A(0));
        if (dsum) v += get<A>(span, dsum + i, A(0));
        put<A>(span, dx + i, v);
    });
}

// The same with parameters along the run: z = x_hat w + v, g = dy act'(z) w
template <bool Plain, class T, class A>
void row_reduce_along(const T* x, const T* dy, int64_t n, const uint8_t* mask, Line<A> line, const A* w, const A* v,
                      Act<A> act, A& g1, A& g2) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    Four<A> s, q;
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
        const uint8_t* m = mask ? mask + i : mask;
        Vec<A> d = real<A>(span, m, get<A>(span, x + i, line.c) - c, A(0));
        Vec<A> g = real<A>(span, m, get<A>(span, dy + i, A(0)), A(0));
        Vec<A> weight = get<A>(span, w + i, A(0));
        if (act.kind) g = g * derivative(act, (d * a + b) * weight + get<A>(span, v + i, A(0)));
        g = g * weight;
        s.v[u] += g;
        q.v[u] += g * d;
    });
    g1 = s.sum();
    g2 = q.sum();
}

template <bool Plain, class T, class A>
void row_combine_along(const T* x, const T* dy, const T* dsum, T* dx, int64_t n, int64_t ahead, const uint8_t* mask, Line<A> line,
                       Combine<A> by, const A* w, const A* v, A* dw, A* dv, Act<A> act) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    Vec<A> A1 = splat(by.a), B = splat(by.b), D = splat(by.d);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        const uint8_t* m = mask ? mask + i : mask;
        Vec<A> d = real<A>(span, m, get<A>(span, x + i, line.c) - c, A(0));
        Vec<A> g = real<A>(span, m, get<A>(span, dy + i, A(0)), A(0));
        Vec<A> weight = get<A>(span, w + i, A(0)), x_hat = d * a + b;
        prefetch(x + i + ahead);
        prefetch(dy + i + ahead);
        if (act.kind) g = g * derivative(act, x_hat * weight + get<A>(span, v + i, A(0)));
        if (dw) put<A>(span, dw + i, get<A>(span, dw + i, A(0)) + g * x_hat);
        if (dv) put<A>(span, dv + i, get<A>(span, dv + i, A(0)) + g);
        if (!dx) return;
        Vec<A> value = real<A>(span, m, A1 * (g * weight) + (B * d + D), A(0));
        if (dsum) value += get<A>(span, dsum + i, A(0));
        put<A>(span, dx + i, value);
    });
}

// ---- columns

// How far ahead of a row to prefetch: the rows that come next, some 4 KiB on, where rows lie side by side; otherwise
// the panel beside this one.
inline int64_t column_ahead(int64_t step, int64_t n, int64_t entry_bytes) {
    if (step > 2 * n) return n;
    int64_t rows = 4096 / (step * entry_bytes + 1);
    return step * (rows < 4 ? 4 : rows);
}

// Rows of exactly K vectors: tables stay in registers, and memory is read in its own order.
template <int K, class A>
struct Kept {
    Vec<A> v[K];
    RENORM_ALWAYS explicit Kept(const A* table) {
        for (int k = 0; k < K; k++) v[k] = load<A>(table + k * kLanes<A>);
    }
    RENORM_ALWAYS void save(A* table) const {
        for (int k = 0; k < K; k++) store<A>(table + k * kLanes<A>, v[k]);
    }
};
// Calls f with the number of vectors in a row, if it is one that the narrow functions are made for.
template <class A, class F>
RENORM_ALWAYS inline bool narrow_row(int64_t n, F f) {
    switch (n % kLanes<A> ? 0 : n / kLanes<A>) {
        case 1: f(Count<1>{}); return true;
        case 2: f(Count<2>{}); return true;
        case 4: f(Count<4>{}); return true;
        case 8: f(Count<8>{}); return true;
        default: return false;
    }
}

template <int K, class T, class A>
void narrow_moments(const T* x, int64_t step, int64_t rows, const A* shift, A* s, A* q) {
    Kept<K, A> c(shift), sum(s), square(q);
    for (int64_t r = 0; r < rows; r++, x += step) {
        for (int k = 0; k < K; k++) {
            prefetch(x + k * kLanes<A> + kStreamAhead / sizeof(T));
            Vec<A> d = load<A>(x + k * kLanes<A>) - c.v[k];
            sum.v[k] += d;
            square.v[k] += d * d;
        }
    }
    sum.save(s);
    square.save(q);
}
template <int K, class T, class A>
void narrow_apply(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t rows, const A* c_table, const A* a_table,
                  const A* b_table) {
    Kept<K, A> c(c_table), a(a_table), b(b_table);
    for (int64_t r = 0; r < rows; r++, x += x_step, y += y_step) {
        for (int k = 0; k < K; k++) {
            prefetch(x + k * kLanes<A> + kStreamAhead / sizeof(T));
            store<A>(y + k * kLanes<A>, (load<A>(x + k * kLanes<A>) - c.v[k]) * a.v[k] + b.v[k]);
        }
    }
}
template <int K, class T, class A>
void narrow_reduce(const T* x, int64_t x_step, const T* dy, int64_t y_step, int64_t rows, const A* center, A* g1, A* g2) {
    Kept<K, A> c(center), s(g1), q(g2);
    for (int64_t r = 0; r < rows; r++, x += x_step, dy += y_step) {
        for (int k = 0; k < K; k++) {
            prefetch(x + k * kLanes<A> + kStreamAhead / sizeof(T));
            prefetch(dy + k * kLanes<A> + kStreamAhead / sizeof(T));
            Vec<A> g = load<A>(dy + k * kLanes<A>);
            s.v[k] += g;
            q.v[k] += g * (load<A>(x + k * kLanes<A>) - c.v[k]);
        }
    }
    s.save(g1);
    q.save(g2);
}
template <int K, class T, class A>
void narrow_combine(const T* x, int64_t x_step, const T* dy, T* dx, int64_t y_step, int64_t rows, const A* center,
                    const A* a_table, const A* b_table, const A* d_table) {
    Kept<K, A> c(center), a(a_table), b(b_table), d(d_table);
    for (int64_t r = 0; r < rows; r++, x += x_step, dy += y_step, dx += y_step) {
        for (int k = 0; k < K; k++) {
            prefetch(x + k * kLanes<A> + kStreamAhead / sizeof(T));
            prefetch(dy + k * kLanes<A> + kStreamAhead / sizeof(T));
            Vec<A> away = load<A>(x + k * kLanes<A>) - c.v[k];
            store<A>(dx + k * kLanes<A>, a.v[k] * load<A>(dy + k * kLanes<A>) + (b.v[k] * away + d.v[k]));
        }
    }
}

// Sums of x - shift and its square added to s and q, and real entries to count.
template <bool Plain, class T, class A>
void column_moments(const T* x, int64_t step, int64_t rows, int64_t n, const uint8_t* mask, int64_t mask_step,
                    const A* shift, A* s, A* q, A* count) {
    if (Plain) mask = nullptr;
    if (Plain && narrow_row<A>(n, [&](auto k) { narrow_moments<k.value, T, A>(x, step, rows, shift, s, q); })) return;
    int64_t r = 0, ahead = column_ahead(step, n, sizeof(T));
    for (; Plain && r + 4 <= rows; r += 4) {
        const T *p0 = x + r * step, *p1 = p0 + step, *p2 = p1 + step, *p3 = p2 + step;
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            if (step <= 2 * n) prefetch(p0 + i + ahead), prefetch(p1 + i + ahead), prefetch(p2 + i + ahead), prefetch(p3 + i + ahead);
            Vec<A> c = get<A>(span, shift + i, A(0));
            Vec<A> d0 = get<A>(span, p0 + i, A(0)) - c, d1 = get<A>(span, p1 + i, A(0)) - c;
            Vec<A> d2 = get<A>(span, p2 + i, A(0)) - c, d3 = get<A>(span, p3 + i, A(0)) - c;
            put<A>(span, s + i, get<A>(span, s + i, A(0)) + ((d0 + d1) + (d2 + d3)));
            put<A>(span, q + i, get<A>(span, q + i, A(0)) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)));
        });
    }
    for (; r < rows; r++) {
        const T* p = x + r * step;
        const uint8_t* bytes = mask ? mask + r * mask_step : nullptr;
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            Vec<A> d = get<A>(span, p + i, A(0)) - get<A>(span, shift + i, A(0));
            if (bytes) {
                d = real<A>(span, bytes + i, d, A(0));
                put<A>(span, count + i, get<A>(span, count + i, A(0)) + real<A>(span, bytes + i, splat(A(1)), A(0)));
            }
            put<A>(span, s + i, get<A>(span, s + i, A(0)) + d);
            put<A>(span, q + i, get<A>(span, q + i, A(0)) + d * d);
        });
    }
}

template <class A>
struct Lines {  // tables, see Line
    const A *c, *a, *b;
};
template <class A>
struct Combines {
    const A *a, *b, *d;
};

// y = act(((x - c) a + b) w + v); w and v, with `Along`, are a number for each row.
template <bool Plain, bool Along, class T, class A>
void column_apply(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t rows, int64_t n, const uint8_t* mask,
                  int64_t mask_step, Lines<A> line, const A* w, const A* v, Act<A> act) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    if (Plain && !Along && narrow_row<A>(n, [&](auto k) {
            narrow_apply<k.value, T, A>(x, x_step, y, y_step, rows, line.c, line.a, line.b);
        }))
        return;
    int64_t r = 0, ahead = column_ahead(x_step, n, sizeof(T));
    for (; Plain && r + 4 <= rows; r += 4) {
        const T *p0 = x + r * x_step, *p1 = p0 + x_step, *p2 = p1 + x_step, *p3 = p2 + x_step;
        T *y0 = y + r * y_step, *y1 = y0 + y_step, *y2 = y1 + y_step, *y3 = y2 + y_step;
        Vec<A> w0, w1, w2, w3, v0, v1, v2, v3;
        if (Along) {
            w0 = splat(w[r]), w1 = splat(w[r + 1]), w2 = splat(w[r + 2]), w3 = splat(w[r + 3]);
            v0 = splat(v[r]), v1 = splat(v[r + 1]), v2 = splat(v[r + 2]), v3 = splat(v[r + 3]);
        }
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            Vec<A> c = get<A>(span, line.c + i, A(0)), a = get<A>(span, line.a + i, A(0)), b = get<A>(span, line.b + i, A(0));
            prefetch(p0 + i + ahead), prefetch(p1 + i + ahead), prefetch(p2 + i + ahead), prefetch(p3 + i + ahead);
            Vec<A> z0 = (get<A>(span, p0 + i, A(0)) - c) * a + b, z1 = (get<A>(span, p1 + i, A(0)) - c) * a + b;
            Vec<A> z2 = (get<A>(span, p2 + i, A(0)) - c) * a + b, z3 = (get<A>(span, p3 + i, A(0)) - c) * a + b;
            if (Along) z0 = z0 * w0 + v0, z1 = z1 * w1 + v1, z2 = z2 * w2 + v2, z3 = z3 * w3 + v3;
            put<A>(span, y0 + i, z0);
            put<A>(span, y1 + i, z1);
            put<A>(span, y2 + i, z2);
            put<A>(span, y3 + i, z3);
        });
    }
    for (; r < rows; r++) {
        const T* p = x + r * x_step;
        T* out = y + r * y_step;
        const uint8_t* bytes = mask ? mask + r * mask_step : nullptr;
        Vec<A> weight = splat(Along ? w[r] : A(1)), bias = splat(Along ? v[r] : A(0));
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            Vec<A> z = (get<A>(span, p + i, A(0)) - get<A>(span, line.c + i, A(0))) * get<A>(span, line.a + i, A(0)) +
                       get<A>(span, line.b + i, A(0));
            if (Along) z = z * weight + bias;
            if (act.kind) z = activate(act, z);
            put<A>(span, out + i, real<A>(span, bytes ? bytes + i : bytes, z, A(0)));
        });
    }
}

// Sums of g w and g w (x - c), g = dy act'(z), added to g1 and g2.
template <bool Plain, bool Along, class T, class A>
void column_reduce(const T* x, int64_t x_step, const T* dy, int64_t y_step, int64_t rows, int64_t n, const uint8_t* mask,
                   int64_t mask_step, Lines<A> line, const A* w, const A* v, Act<A> act, A* g1, A* g2) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    if (Plain && !Along && narrow_row<A>(n, [&](auto k) {
            narrow_reduce<k.value, T, A>(x, x_step, dy, y_step, rows, line.c, g1, g2);
        }))
        return;
    int64_t r = 0, ahead = column_ahead(x_step, n, sizeof(T));
    for (; Plain && r + 4 <= rows; r += 4) {
        const T *p0 = x + r * x_step, *p1 = p0 + x_step, *p2 = p1 + x_step, *p3 = p2 + x_step;
        const T *y0 = dy + r * y_step, *y1 = y0 + y_step, *y2 = y1 + y_step, *y3 = y2 + y_step;
        Vec<A> w0, w1, w2, w3;
        if (Along) w0 = splat(w[r]), w1 = splat(w[r + 1]), w2 = splat(w[r + 2]), w3 = splat(w[r + 3]);
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            if (x_step <= 2 * n) {
                prefetch(p0 + i + ahead), prefetch(p1 + i + ahead), prefetch(p2 + i + ahead), prefetch(p3 + i + ahead);
                prefetch(y0 + i + ahead), prefetch(y1 + i + ahead), prefetch(y2 + i + ahead), prefetch(y3 + i + ahead);
            }
            Vec<A> c = get<A>(span, line.c + i, A(0));
            Vec<A> a0 = get<A>(span, y0 + i, A(0)), a1 = get<A>(span, y1 + i, A(0));
            Vec<A> a2 = get<A>(span, y2 + i, A(0)), a3 = get<A>(span, y3 + i, A(0));
            if (Along) a0 = a0 * w0, a1 = a1 * w1, a2 = a2 * w2, a3 = a3 * w3;
            Vec<A> d0 = get<A>(span, p0 + i, A(0)) - c, d1 = get<A>(span, p1 + i, A(0)) - c;
            Vec<A> d2 = get<A>(span, p2 + i, A(0)) - c, d3 = get<A>(span, p3 + i, A(0)) - c;
            put<A>(span, g1 + i, get<A>(span, g1 + i, A(0)) + ((a0 + a1) + (a2 + a3)));
            put<A>(span, g2 + i, get<A>(span, g2 + i, A(0)) + ((a0 * d0 + a1 * d1) + (a2 * d2 + a3 * d3)));
        });
    }
    for (; r < rows; r++) {
        const T *p = x + r * x_step, *up = dy + r * y_step;
        const uint8_t* bytes = mask ? mask + r * mask_step : nullptr;
        Vec<A> weight = splat(Along ? w[r] : A(1)), bias = splat(Along ? v[r] : A(0));
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            const uint8_t* m = bytes ? bytes + i : bytes;
            Vec<A> d = real<A>(span, m, get<A>(span, p + i, A(0)) - get<A>(span, line.c + i, A(0)), A(0));
            Vec<A> g = real<A>(span, m, get<A>(span, up + i, A(0)), A(0));
            if (act.kind) {
                Vec<A> z = d * get<A>(span, line.a + i, A(0)) + get<A>(span, line.b + i, A(0));
                g = g * derivative(act, Along ? z * weight + bias : z);
            }
            if (Along) g = g * weight;
            put<A>(span, g1 + i, get<A>(span, g1 + i, A(0)) + g);
            put<A>(span, g2 + i, get<A>(span, g2 + i, A(0)) + g * d);
        });
    }
}

// dx = A g w + B (x - c) + D (+ dsum), where dx is wanted; with `Along`, sums of g x_hat and g over each row added
// to dw and dv.
template <bool Plain, bool Along, class T, class A>
void column_combine(const T* x, int64_t x_step, const T* dy, const T* dsum, T* dx, int64_t y_step, int64_t rows, int64_t n,
                    const uint8_t* mask, int64_t mask_step, Lines<A> line, Combines<A> by, const A* w, const A* v,
                    double* dw, double* dv, Act<A> act) {
    if (Plain) mask = nullptr, act.kind = kIdentity;
    if (Plain && !Along && dx && !dsum && narrow_row<A>(n, [&](auto k) {
            narrow_combine<k.value, T, A>(x, x_step, dy, dx, y_step, rows, line.c, by.a, by.b, by.d);
        }))
        return;
    int64_t r = 0, ahead = column_ahead(x_step, n, sizeof(T));
    for (; Plain && Along && dx && !dsum && r + 2 <= rows; r += 2) {
        const T *p0 = x + r * x_step, *p1 = p0 + x_step, *g0 = dy + r * y_step, *g1 = g0 + y_step;
        T *y0 = dx + r * y_step, *y1 = y0 + y_step;
        Vec<A> w0 = splat(w[r]), w1 = splat(w[r + 1]);
        Four<A> sw0, sw1, sv0, sv1;
        each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
            Vec<A> c = get<A>(span, line.c + i, A(0)), a = get<A>(span, line.a + i, A(0)), e = get<A>(span, line.b + i, A(0));
            Vec<A> b = get<A>(span, by.b + i, A(0)), d = get<A>(span, by.d + i, A(0));
            Vec<A> d0 = get<A>(span, p0 + i, A(0)) - c, d1 = get<A>(span, p1 + i, A(0)) - c;
            prefetch(p0 + i + ahead), prefetch(p1 + i + ahead), prefetch(g0 + i + ahead), prefetch(g1 + i + ahead);
            Vec<A> up0 = get<A>(span, g0 + i, A(0)), up1 = get<A>(span, g1 + i, A(0));
            sv0.v[u & 1] += up0;
            sv1.v[u & 1] += up1;
            sw0.v[u & 1] += up0 * (d0 * a + e);
            sw1.v[u & 1] += up1 * (d1 * a + e);
            put<A>(span, y0 + i, a * (up0 * w0) + (b * d0 + d));
            put<A>(span, y1 + i, a * (up1 * w1) + (b * d1 + d));
        });
        if (dw) {
            dw[r] += double(sw0.sum()), dw[r + 1] += double(sw1.sum());
            dv[r] += double(sv0.sum()), dv[r + 1] += double(sv1.sum());
        }
    }
    for (; Plain && !Along && dx && !dsum && r + 4 <= rows; r += 4) {
        const T *p0 = x + r * x_step, *p1 = p0 + x_step, *p2 = p1 + x_step, *p3 = p2 + x_step;
        const T *g0 = dy + r * y_step, *g1 = g0 + y_step, *g2 = g1 + y_step, *g3 = g2 + y_step;
        T *y0 = dx + r * y_step, *y1 = y0 + y_step, *y2 = y1 + y_step, *y3 = y2 + y_step;
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            prefetch(p0 + i + ahead), prefetch(p1 + i + ahead), prefetch(p2 + i + ahead), prefetch(p3 + i + ahead);
            prefetch(g0 + i + ahead), prefetch(g1 + i + ahead), prefetch(g2 + i + ahead), prefetch(g3 + i + ahead);
            Vec<A> c = get<A>(span, line.c + i, A(0));
            Vec<A> a = get<A>(span, by.a + i, A(0)), b = get<A>(span, by.b + i, A(0)), d = get<A>(span, by.d + i, A(0));
            put<A>(span, y0 + i, a * get<A>(span, g0 + i, A(0)) + (b * (get<A>(span, p0 + i, A(0)) - c) + d));
            put<A>(span, y1 + i, a * get<A>(span, g1 + i, A(0)) + (b * (get<A>(span, p1 + i, A(0)) - c) + d));
            put<A>(span, y2 + i, a * get<A>(span, g2 + i, A(0)) + (b * (get<A>(span, p2 + i, A(0)) - c) + d));
            put<A>(span, y3 + i, a * get<A>(span, g3 + i, A(0)) + (b * (get<A>(span, p3 + i, A(0)) - c) + d));
        });
    }
    for (; r < rows; r++) {
        const T *p = x + r * x_step, *up = dy + r * y_step, *extra = dsum ? dsum + r * y_step : nullptr;
        T* out = dx ? dx + r * y_step : nullptr;
        const uint8_t* bytes = mask ? mask + r * mask_step : nullptr;
        Vec<A> weight = splat(Along ? w[r] : A(1)), bias = splat(Along ? v[r] : A(0));
        Four<A> sw, sv;
        each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
            const uint8_t* m = bytes ? bytes + i : bytes;
            Vec<A> d = real<A>(span, m, get<A>(span, p + i, A(0)) - get<A>(span, line.c + i, A(0)), A(0));
            Vec<A> g = real<A>(span, m, get<A>(span, up + i, A(0)), A(0));
            if (Along || act.kind) {
                Vec<A> x_hat = d * get<A>(span, line.a + i, A(0)) + get<A>(span, line.b + i, A(0));
                if (act.kind) g = g * derivative(act, Along ? x_hat * weight + bias : x_hat);
                sw.v[u] += g * x_hat;
                sv.v[u] += g;
            }
            if (!out) return;
            Vec<A> value = get<A>(span, by.a + i, A(0)) * (Along ? g * weight : g) +
                           (get<A>(span, by.b + i, A(0)) * d + get<A>(span, by.d + i, A(0)));
            value = real<A>(span, m, value, A(0));
            if (extra) value += get<A>(span, extra + i, A(0));
            put<A>(span, out + i, value);
        });
        if (Along && dw) {
            dw[r] += double(sw.sum());
            dv[r] += double(sv.sum());
        }
    }
}
