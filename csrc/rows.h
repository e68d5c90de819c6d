// Row kernels: the innermost loop is summed over, each run belongs to one cell.

// A shift to begin with: the mean of a vector's worth of entries, or of all where some are masked.
template <class T, class A = Acc<T>>
inline A first_shift(const T* x, int64_t n, const uint8_t* mask) {
    int64_t some = mask ? n : least(n, kLanes<A>);
    A sum = mask ? row_total<false, T, A>(x, n, mask) : row_total<true, T, A>(x, some, nullptr);
    A mean = sum / A(mask ? count_real(mask, n) : some);
    return finite(mean) ? mean : A(0);
}

// Adds one run to a cell.
template <class T, class A>
inline void add_run(Cell<A>& cell, const T* x, int64_t n, const uint8_t* mask, bool about_zero) {
    for (int64_t i = 0; i < n; i += kBlock) {
        int64_t size = least(kBlock, n - i);
        const T* p = x + i;
        const uint8_t* m = mask ? mask + i : nullptr;
        double count = double(m ? count_real(m, size) : size);
        if (count == 0) continue;
        if (cell.n == 0) {
            cell.shift = about_zero ? A(0) : first_shift(p, size, m);
            cell.due = 2 * count;
        }
        A s, q;
        m ? row_moments<false>(p, size, m, cell.shift, s, q) : row_moments<true>(p, size, m, cell.shift, s, q);
        if (cell.n == 0 && !about_zero && far(s, q, A(count))) {
            cell.shift += s / A(count);
            m ? row_moments<false>(p, size, m, cell.shift, s, q) : row_moments<true>(p, size, m, cell.shift, s, q);
        }
        double wide_s, wide_q;
        if (finite(q)) {
            wide_s = s, wide_q = q;
        } else {
            wide_moments(p, size, 1, m, 1, cell.shift, wide_s, wide_q);
        }
        cell.n += count;
        cell.s += wide_s;
        cell.q += wide_q;
        if (!about_zero && cell.n >= cell.due) {
            cell.shift_to_mean();
            cell.due = 2 * cell.n;
        }
    }
}

// Where a thread's runs are: those of neighbouring cells, for each i < r0.
struct Runs {
    const Job& job;
    const Nest& nest;
    explicit Runs(const Job& job) : job(job), nest(job.nest) {}
    int64_t at(int operand, int64_t cell, int64_t i) const {
        int64_t outer = nest.outer_dims == 0 ? 0 : nest.k1 == 1 ? cell : cell / nest.k1;
        return outer_offset(nest, operand, outer) + (cell - outer * nest.k1) * nest.stride[operand][1] +
               i * nest.stride[operand][0];
    }
};

// The mask of a run: null where all of it is real; `none` where nothing is.
struct RunMask {
    const uint8_t* bytes = nullptr;
    bool none = false;
    RunMask(const Job& job, int64_t offset, int64_t start) {
        if (!job.mask) return;
        if (job.nest.mask_inner) {
            bytes = job.mask + offset + start;
        } else {
            none = job.mask[offset] == 0;
        }
    }
};

template <class T>
inline void zero(T* y, int64_t n) {
    memset((void*)y, 0, size_t(n) * sizeof(T));
}

template <class T>
struct RowForward : Forward<T> {
    using A = Acc<T>;
    using Forward<T>::job, Forward<T>::nest, Forward<T>::parameters, Forward<T>::x, Forward<T>::x_operand;
    Runs runs;

    RowForward(const Job& job, const Parameters<A>& parameters) : Forward<T>(job, parameters), runs(job) {}

    void measure(Cell<A>& cell, int64_t index, int64_t i, int64_t start, int64_t n) const {
        if (job.residual) {
            int64_t out = runs.at(kY, index, i) + start;
            row_add<T, A>((const T*)job.x + runs.at(kX, index, i) + start, (const T*)job.residual + out, (T*)job.sum + out,
                          n);
        }
        RunMask mask(job, job.mask ? runs.at(kMask, index, i) : 0, start);
        if (!mask.none && !job.measured)
            add_run(cell, x + runs.at(x_operand, index, i) + start, n, mask.bytes, job.about_zero != 0);
    }
    void apply(Line<A> line, int64_t index, int64_t i, int64_t start, int64_t n, int64_t ahead) const {
        T* y = (T*)job.y + runs.at(kY, index, i) + start;
        RunMask mask(job, job.mask ? runs.at(kMask, index, i) : 0, start);
        const T* p = x + runs.at(x_operand, index, i) + start;
        Act<A> act = act_of<A>(job);
        if (mask.none) {
            zero(y, n);
        } else if (nest.along) {
            const A *w = parameters.w + start, *b = parameters.b + start;
            mask.bytes || act.kind ? row_apply_along<false>(p, y, n, ahead, mask.bytes, line, w, b, act)
                                 : row_apply_along<true>(p, y, n, ahead, mask.bytes, line, w, b, act);
        } else {
            mask.bytes || act.kind ? row_apply<false>(p, y, n, ahead, mask.bytes, line, act)
                                 : row_apply<true>(p, y, n, ahead, mask.bytes, line, act);
        }
    }
};

// How sets are handed out: in panels that fit the cache, or, where they are few, run by run in three phases.
struct Panels {
    int64_t sets;  // of a panel
    int threads;
    bool few;
    Panels(const Job& job, const Sizes& size, int64_t bytes_per_entry) {
        const Nest& nest = job.nest;
        int64_t set_bytes = nest.merge * size.per_cell * bytes_per_entry;
        threads = worth(job, size.cells * size.per_cell);
        few = threads > 1 && !nest.along && size.sets < 4 * threads && size.sets % threads != 0;
        // Runs of neighbouring cells are contiguous: a panel takes several where one run is short, but where a cell is
        // one run it should still be in L1 when it is read again.
        sets = most(1, least((nest.r0 == 1 ? kNear : kCache) / most(1, set_bytes), 1024 / nest.merge));
        sets = most(1, least(sets, size.sets / threads));
    }
};

// The units of the three phases: (cell, i, chunk of the run).
struct Units {
    int64_t chunk, chunks, r0, r1, total;
    Units(const Nest& nest, const Sizes& size, int threads) {
        r0 = nest.r0, r1 = nest.r1;
        int64_t wanted = 8 * threads / most(1, size.cells * r0) + 1;
        chunk = most(kBlock, (r1 / wanted + kBlock - 1) / kBlock * kBlock);
        chunks = (r1 + chunk - 1) / chunk;
        total = size.cells * r0 * chunks;
    }
    template <class F>
    void visit(int thread, int threads, F f) const {  // f(cell, i, start, n)
        for (int64_t unit = total * thread / threads; unit < total * (thread + 1) / threads; unit++) {
            int64_t run = unit / chunks, start = unit % chunks * chunk;
            f(run / r0, run % r0, start, least(chunk, r1 - start));
        }
    }
};

// Few sets: all threads share each of them, a chunk of a run at a time, in phases.
template <class T>
bool row_forward_in_chunks(const RowForward<T>& kernel, const Panels& panels) {
    using A = Acc<T>;
    const Nest& nest = kernel.nest;
    const Sizes& size = kernel.size;
    Units units(nest, size, panels.threads);
    Scratch<Cell<A>> cells(size.cells * panels.threads);
    if (!cells) return false;
    parallel(panels.threads, [&](int thread, int threads) {
        units.visit(thread, threads, [&](int64_t cell, int64_t i, int64_t start, int64_t n) {
            kernel.measure(cells[cell * panels.threads + thread], cell, i, start, n);
        });
    });
    for (int64_t set = 0; set < size.sets; set++)
        kernel.finish(cells + set * nest.merge * panels.threads, nest.merge * panels.threads, set);
    if (!kernel.job.y) return true;
    parallel(panels.threads, [&](int thread, int threads) {
        units.visit(thread, threads, [&](int64_t cell, int64_t i, int64_t start, int64_t n) {
            kernel.apply(kernel.line(cell), cell, i, start, n, n);
        });
    });
    return true;
}

// Many sets: each thread has sets of its own, a panel at a time, which is read again while it is in the cache.
template <class T>
bool row_forward_in_panels(const RowForward<T>& kernel, const Panels& panels) {
    using A = Acc<T>;
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    const Sizes& size = kernel.size;
    int64_t width = panels.sets * nest.merge;
    Scratch<Cell<A>> all_cells(width * panels.threads);
    Scratch<Line<A>> all_lines(width * panels.threads);
    if (!all_cells || !all_lines) return false;
    parallel(panels.threads, [&](int thread, int threads) {
        Cell<A>* cells = all_cells + width * thread;
        Line<A>* lines = all_lines + width * thread;
        int64_t last = size.sets * (thread + 1) / threads;
        for (int64_t set = size.sets * thread / threads; set < last; set += panels.sets) {
            int64_t sets = least(panels.sets, last - set), first = set * nest.merge, num = sets * nest.merge;
            if (!job.measured || job.residual) {
                for (int64_t c = 0; c < num; c++) cells[c].n = cells[c].s = cells[c].q = 0;
                for (int64_t i = 0; i < nest.r0; i++)
                    for (int64_t c = 0; c < num; c++) kernel.measure(cells[c], first + c, i, 0, nest.r1);
                for (int64_t s = 0; s < sets; s++) kernel.finish(cells + s * nest.merge, nest.merge, set + s);
            }
            if (!job.y) continue;
            for (int64_t c = 0; c < num; c++) lines[c] = kernel.line(first + c);
            for (int64_t i = nest.r0 - 1; i >= 0; i--)  // backwards: what was read last is still in the cache
                for (int64_t c = 0; c < num; c++) kernel.apply(lines[c], first + c, i, 0, nest.r1, num * nest.r1);
        }
    });
    return true;
}

template <class T>
bool row_forward(const Job& job) {
    Parameters<Acc<T>> parameters(job);
    if (!parameters.ok) return false;
    RowForward<T> kernel(job, parameters);
    Panels panels(job, kernel.size, sizeof(T));
    return panels.few ? row_forward_in_chunks(kernel, panels) : row_forward_in_panels(kernel, panels);
}

// ---- backward

template <class T>
struct RowBackward : Backward<T> {
    using A = Acc<T>;
    using Backward<T>::job, Backward<T>::nest, Backward<T>::parameters;
    Runs runs;

    RowBackward(const Job& job, const Parameters<A>& parameters, double* sums)
        : Backward<T>(job, parameters, sums), runs(job) {}

    void reduce(Line<A> line, int64_t index, int64_t i, int64_t start, int64_t n, double& s1, double& s2) const {
        RunMask mask(job, job.mask ? runs.at(kMask, index, i) : 0, start);
        if (mask.none) return;
        const T* x = (const T*)job.x + runs.at(kX, index, i) + start;
        const T* dy = (const T*)job.dy + runs.at(kY, index, i) + start;
        for (int64_t at = 0; at < n; at += kBlock) {
            int64_t num = least(kBlock, n - at);
            const uint8_t* m = mask.bytes ? mask.bytes + at : nullptr;
            Act<A> act = act_of<A>(job);
            A a, b;
            if (nest.along) {
                const A *w = parameters.w + start + at, *v = parameters.b + start + at;
                m || act.kind ? row_reduce_along<false>(x + at, dy + at, num, m, line, w, v, act, a, b)
                              : row_reduce_along<true>(x + at, dy + at, num, m, line, w, v, act, a, b);
            } else {
                m || act.kind ? row_reduce<false>(x + at, dy + at, num, m, line, act, a, b)
                              : row_reduce<true>(x + at, dy + at, num, m, line, act, a, b);
            }
            s1 += a;
            s2 += b;
        }
    }
    void apply(Line<A> line, Combine<A> by, int64_t index, int64_t i, int64_t start, int64_t n, int64_t ahead, A* dw,
               A* dv) const {
        int64_t out = runs.at(kY, index, i) + start;
        T* dx = job.dx ? (T*)job.dx + out : nullptr;
        const T* dsum = job.dsum ? (const T*)job.dsum + out : nullptr;
        RunMask mask(job, job.mask ? runs.at(kMask, index, i) : 0, start);
        if (mask.none) {
            if (dx && dsum) memcpy((void*)dx, (const void*)dsum, size_t(n) * sizeof(T));
            else if (dx) zero(dx, n);
            return;
        }
        const T* x = (const T*)job.x + runs.at(kX, index, i) + start;
        const T* dy = (const T*)job.dy + out;
        Act<A> act = act_of<A>(job);
        bool plain = !mask.bytes && !act.kind;
        if (nest.along) {
            const A *w = parameters.w + start, *v = parameters.b + start;
            plain ? row_combine_along<true>(x, dy, dsum, dx, n, ahead, mask.bytes, line, by, w, v, dw, dv, act)
                  : row_combine_along<false>(x, dy, dsum, dx, n, ahead, mask.bytes, line, by, w, v, dw, dv, act);
        } else {
            plain ? row_combine<true>(x, dy, dsum, dx, n, ahead, mask.bytes, line, by, act)
                  : row_combine<false>(x, dy, dsum, dx, n, ahead, mask.bytes, line, by, act);
        }
    }
};

template <class T>
bool row_backward_in_chunks(const RowBackward<T>& kernel, const Panels& panels) {
    using A = Acc<T>;
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    const Sizes& size = kernel.size;
    Units units(nest, size, panels.threads);
    Scratch<double> parts(2 * size.cells * panels.threads);
    Scratch<SetGradient> gradients(size.sets);
    if (!parts || !gradients) return false;
    if (!job.combine) {
        parallel(panels.threads, [&](int thread, int threads) {
            double* part = parts + 2 * size.cells * thread;
            units.visit(thread, threads, [&](int64_t cell, int64_t i, int64_t start, int64_t n) {
                kernel.reduce(kernel.line(cell), cell, i, start, n, part[cell], part[size.cells + cell]);
            });
        });
        for (int thread = 0; thread < panels.threads; thread++)
            for (int64_t c = 0; c < size.cells; c++) {
                kernel.g1[c] += parts[2 * size.cells * thread + c];
                kernel.g2[c] += parts[2 * size.cells * thread + size.cells + c];
            }
    }
    for (int64_t set = 0; set < size.sets; set++) gradients[set] = kernel.solve(set);
    if (job.dx) {
        parallel(panels.threads, [&](int thread, int threads) {
            units.visit(thread, threads, [&](int64_t cell, int64_t i, int64_t start, int64_t n) {
                Combine<A> by = kernel.combine(cell, gradients[cell / nest.merge]);
                kernel.apply(kernel.line(cell), by, cell, i, start, n, n, nullptr, nullptr);
            });
        });
    }
    return collect(job, kernel.g1, kernel.g2, size.cells);
}

template <class T>
bool row_backward_in_panels(const RowBackward<T>& kernel, const Panels& panels) {
    using A = Acc<T>;
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    const Sizes& size = kernel.size;
    int64_t width = panels.sets * nest.merge;
    int64_t along = nest.along ? nest.params : 0;
    Scratch<Line<A>> all_lines(width * panels.threads);
    Scratch<A> blocks(2 * along * panels.threads);
    Scratch<double> tables(2 * along * panels.threads);
    if (!all_lines || !blocks || !tables) return false;
    bool wants = along && (job.dweight || job.dbias);
    parallel(panels.threads, [&](int thread, int threads) {
        Line<A>* lines = all_lines + width * thread;
        A *dw = wants && job.dweight ? blocks + 2 * along * thread : nullptr;
        A *dv = wants && job.dbias ? blocks + 2 * along * thread + along : nullptr;
        double* table = tables + 2 * along * thread;
        int64_t last = size.sets * (thread + 1) / threads, since = 0;
        auto flush = [&]() {
            for (int64_t p = 0; p < 2 * along; p++) {
                table[p] += double(blocks[2 * along * thread + p]);
                blocks[2 * along * thread + p] = A(0);
            }
            since = 0;
        };
        for (int64_t set = size.sets * thread / threads; set < last; set += panels.sets) {
            int64_t sets = least(panels.sets, last - set), first = set * nest.merge, num = sets * nest.merge;
            for (int64_t c = 0; c < num; c++) lines[c] = kernel.line(first + c);
            if (!job.combine) {
                for (int64_t i = 0; i < nest.r0; i++)
                    for (int64_t c = 0; c < num; c++)
                        kernel.reduce(lines[c], first + c, i, 0, nest.r1, kernel.g1[first + c], kernel.g2[first + c]);
            }
            for (int64_t s = 0; s < sets; s++) {
                SetGradient gradient = kernel.solve(set + s);
                if (!job.dx && !wants) continue;
                for (int64_t i = nest.r0 - 1; i >= 0; i--)
                    for (int64_t c = s * nest.merge; c < (s + 1) * nest.merge; c++)
                        kernel.apply(lines[c], kernel.combine(first + c, gradient), first + c, i, 0, nest.r1,
                                     num * nest.r1, dw, dv);
                since++;
                if (wants && since == 128) flush();
            }
        }
        if (wants) flush();
    });
    return along ? collect_along(job, tables, along, panels.threads) : collect(job, kernel.g1, kernel.g2, size.cells);
}

template <class T>
bool row_backward(const Job& job) {
    Parameters<Acc<T>> parameters(job);
    Sizes size(job.nest);
    Scratch<double> sums(2 * size.cells);
    if (!parameters.ok || !sums) return false;
    RowBackward<T> kernel(job, parameters, sums);
    Panels panels(job, size, 2 * sizeof(T));
    return panels.few ? row_backward_in_chunks(kernel, panels) : row_backward_in_panels(kernel, panels);
}
