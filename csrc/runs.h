// What is done to one contiguous run of entries: the innermost loops of the kernels.
//
// *Row* functions see a run that belongs to one cell. *Column* functions see a run with one cell for each entry,
// and tables with a number for each. Masks are null or one byte for each entry.

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
inline void each(int64_t n, F f) {
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

template <class A>
struct Four {
    Vec<A> v[4];
    Four() {
        for (int u = 0; u < 4; u++) v[u] = splat(A(0));
    }
    A sum() const { return total<A>((v[0] + v[1]) + (v[2] + v[3])); }
};

inline int64_t count_real(const uint8_t* mask, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += mask[i] != 0;
    return count;
}

// ---- rows

template <class T, class A>
A row_total(const T* x, int64_t n, const uint8_t* mask) {
    Four<A> s;
    each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
        s.v[u] += real<A>(span, mask ? mask + i : mask, get<A>(span, x + i, A(0)), A(0));
    });
    return s.sum();
}

template <class T, class A>
void row_moments(const T* x, int64_t n, const uint8_t* mask, A shift, A& s_out, A& q_out) {
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

template <class T, class A>
void row_apply(const T* x, T* y, int64_t n, const uint8_t* mask, Line<A> line, Act<A> act) {
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        Vec<A> z = (get<A>(span, x + i, A(0)) - c) * a + b;
        if (act.kind) z = activate(act, z);
        put<A>(span, y + i, real<A>(span, mask ? mask + i : mask, z, A(0)));
    });
}

// y = act(((x - c) a + b) w + v), w and v along the run
template <class T, class A>
void row_apply_along(const T* x, T* y, int64_t n, const uint8_t* mask, Line<A> line, const A* w, const A* v, Act<A> act) {
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
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
template <class T, class A>
void row_reduce(const T* x, const T* dy, int64_t n, const uint8_t* mask, Line<A> line, Act<A> act, A& g1, A& g2) {
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

template <class T, class A>
void row_combine(const T* x, const T* dy, const T* dsum, T* dx, int64_t n, const uint8_t* mask, Line<A> line,
                 Combine<A> by, Act<A> act) {
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    Vec<A> A1 = splat(by.a), B = splat(by.b), D = splat(by.d);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        Vec<A> d = get<A>(span, x + i, A(0)) - c;
        Vec<A> g = get<A>(span, dy + i, A(0));
        if (act.kind) g = g * derivative(act, d * a + b);
        Vec<A> v = real<A>(span, mask ? mask + i : mask, A1 * g + (B * d + D), A(0));
        if (dsum) v += get<A>(span, dsum + i, A(0));
        put<A>(span, dx + i, v);
    });
}

// The same with parameters along the run: z = x_hat w + v, g = dy act'(z) w
template <class T, class A>
void row_reduce_along(const T* x, const T* dy, int64_t n, const uint8_t* mask, Line<A> line, const A* w, const A* v,
                      Act<A> act, A& g1, A& g2) {
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

template <class T, class A>
void row_combine_along(const T* x, const T* dy, const T* dsum, T* dx, int64_t n, const uint8_t* mask, Line<A> line,
                       Combine<A> by, const A* w, const A* v, A* dw, A* dv, Act<A> act) {
    Vec<A> c = splat(line.c), a = splat(line.a), b = splat(line.b);
    Vec<A> A1 = splat(by.a), B = splat(by.b), D = splat(by.d);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        const uint8_t* m = mask ? mask + i : mask;
        Vec<A> d = real<A>(span, m, get<A>(span, x + i, line.c) - c, A(0));
        Vec<A> g = real<A>(span, m, get<A>(span, dy + i, A(0)), A(0));
        Vec<A> weight = get<A>(span, w + i, A(0)), x_hat = d * a + b;
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

// `rows` runs, `step` apart: sums of x - shift and its square added to s and q, and real entries to count.
template <class T, class A>
void column_moments(const T* x, int64_t step, int64_t rows, int64_t n, const uint8_t* mask, int64_t mask_step,
                    const A* shift, A* s, A* q, A* count) {
    int64_t r = 0;
    if (!mask) {
        for (; r + 4 <= rows; r += 4) {
            const T *p0 = x + r * step, *p1 = p0 + step, *p2 = p1 + step, *p3 = p2 + step;
            each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
                Vec<A> c = get<A>(span, shift + i, A(0));
                Vec<A> d0 = get<A>(span, p0 + i, A(0)) - c, d1 = get<A>(span, p1 + i, A(0)) - c;
                Vec<A> d2 = get<A>(span, p2 + i, A(0)) - c, d3 = get<A>(span, p3 + i, A(0)) - c;
                put<A>(span, s + i, get<A>(span, s + i, A(0)) + ((d0 + d1) + (d2 + d3)));
                put<A>(span, q + i, get<A>(span, q + i, A(0)) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)));
            });
        }
    }
    for (; r < rows; r++) {
        const T* p = x + r * step;
        const uint8_t* row_mask = mask ? mask + r * mask_step : nullptr;
        each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
            Vec<A> d = get<A>(span, p + i, A(0)) - get<A>(span, shift + i, A(0));
            if (row_mask) {
                d = real<A>(span, row_mask + i, d, A(0));
                put<A>(span, count + i, get<A>(span, count + i, A(0)) + real<A>(span, row_mask + i, splat(A(1)), A(0)));
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

template <class T, class A>
void column_apply(const T* x, T* y, int64_t n, const uint8_t* mask, Lines<A> line, Act<A> act) {
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        Vec<A> z = (get<A>(span, x + i, A(0)) - get<A>(span, line.c + i, A(0))) * get<A>(span, line.a + i, A(0)) +
                   get<A>(span, line.b + i, A(0));
        if (act.kind) z = activate(act, z);
        put<A>(span, y + i, real<A>(span, mask ? mask + i : mask, z, A(0)));
    });
}

// One parameter for the whole run: z = x_hat w + v
template <class T, class A>
void column_apply_along(const T* x, T* y, int64_t n, const uint8_t* mask, Lines<A> line, A w, A v, Act<A> act) {
    Vec<A> weight = splat(w), bias = splat(v);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        Vec<A> z = (get<A>(span, x + i, A(0)) - get<A>(span, line.c + i, A(0))) * get<A>(span, line.a + i, A(0)) +
                   get<A>(span, line.b + i, A(0));
        z = z * weight + bias;
        if (act.kind) z = activate(act, z);
        put<A>(span, y + i, real<A>(span, mask ? mask + i : mask, z, A(0)));
    });
}

// Sums of g w and g w (x - c) added to g1 and g2; z = (x_hat) w + v.
template <class T, class A>
void column_reduce(const T* x, const T* dy, int64_t n, const uint8_t* mask, Lines<A> line, A w, A v, Act<A> act, A* g1,
                   A* g2) {
    Vec<A> weight = splat(w), bias = splat(v);
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        const uint8_t* m = mask ? mask + i : mask;
        Vec<A> d = real<A>(span, m, get<A>(span, x + i, A(0)) - get<A>(span, line.c + i, A(0)), A(0));
        Vec<A> g = real<A>(span, m, get<A>(span, dy + i, A(0)), A(0));
        if (act.kind) {
            Vec<A> x_hat = d * get<A>(span, line.a + i, A(0)) + get<A>(span, line.b + i, A(0));
            g = g * derivative(act, x_hat * weight + bias);
        }
        g = g * weight;
        put<A>(span, g1 + i, get<A>(span, g1 + i, A(0)) + g);
        put<A>(span, g2 + i, get<A>(span, g2 + i, A(0)) + g * d);
    });
}

// The same over four runs at once, without mask, activation and parameter.
template <class T, class A>
void column_reduce_four(const T* x, int64_t step, const T* dy, int64_t dy_step, int64_t n, const A* center, A* g1, A* g2) {
    const T *x1 = x + step, *x2 = x1 + step, *x3 = x2 + step;
    const T *y1 = dy + dy_step, *y2 = y1 + dy_step, *y3 = y2 + dy_step;
    each<A>(n, [&](int64_t i, int, auto span) RENORM_INLINE {
        Vec<A> c = get<A>(span, center + i, A(0));
        Vec<A> a0 = get<A>(span, dy + i, A(0)), a1 = get<A>(span, y1 + i, A(0));
        Vec<A> a2 = get<A>(span, y2 + i, A(0)), a3 = get<A>(span, y3 + i, A(0));
        Vec<A> d0 = get<A>(span, x + i, A(0)) - c, d1 = get<A>(span, x1 + i, A(0)) - c;
        Vec<A> d2 = get<A>(span, x2 + i, A(0)) - c, d3 = get<A>(span, x3 + i, A(0)) - c;
        put<A>(span, g1 + i, get<A>(span, g1 + i, A(0)) + ((a0 + a1) + (a2 + a3)));
        put<A>(span, g2 + i, get<A>(span, g2 + i, A(0)) + ((a0 * d0 + a1 * d1) + (a2 * d2 + a3 * d3)));
    });
}

// dx = A g w + B (x - c) + D (+ dsum); sums of g x_hat and g over the run added to dw and dv.
template <class T, class A>
void column_combine(const T* x, const T* dy, const T* dsum, T* dx, int64_t n, const uint8_t* mask, Lines<A> line,
                    Combines<A> by, A w, A v, double* dw, double* dv, Act<A> act) {
    Vec<A> weight = splat(w), bias = splat(v);
    Four<A> sw, sv;
    each<A>(n, [&](int64_t i, int u, auto span) RENORM_INLINE {
        const uint8_t* m = mask ? mask + i : mask;
        Vec<A> d = real<A>(span, m, get<A>(span, x + i, A(0)) - get<A>(span, line.c + i, A(0)), A(0));
        Vec<A> g = real<A>(span, m, get<A>(span, dy + i, A(0)), A(0));
        if (act.kind || dw) {
            Vec<A> x_hat = d * get<A>(span, line.a + i, A(0)) + get<A>(span, line.b + i, A(0));
            if (act.kind) g = g * derivative(act, x_hat * weight + bias);
            sw.v[u] += g * x_hat;
            sv.v[u] += g;
        }
        if (!dx) return;
        Vec<A> value = get<A>(span, by.a + i, A(0)) * (g * weight) +
                       (get<A>(span, by.b + i, A(0)) * d + get<A>(span, by.d + i, A(0)));
        value = real<A>(span, m, value, A(0));
        if (dsum) value += get<A>(span, dsum + i, A(0));
        put<A>(span, dx + i, value);
    });
    if (dw) {
        *dw += double(sw.sum());
        *dv += double(sv.sum());
    }
}
