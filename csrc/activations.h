// Activations that follow a norm, and their derivatives at the norm's output z.

template <class A>
inline Vec<A> exponential(Vec<A> x) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = A(exp(double(lanes[i])));
    std::memcpy(&x, lanes, sizeof x);
    return x;
}
template <class A>
inline Vec<A> error_function(Vec<A> x) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = A(erf(double(lanes[i])));
    std::memcpy(&x, lanes, sizeof x);
    return x;
}

#if defined(__GNUC__) && !defined(RENORM_PLAIN_LANES)
// exp(x) = 2^n exp(r), |r| <= ln(2) / 2; the polynomial is within 2e-9 of exp(r), fitted for this file.
template <>
inline Vec<float> exponential<float>(Vec<float> x) {
    typedef Vec<float> V;
    V low = splat(-87.0f), high = splat(88.0f);
    V inside = x < low ? low : x;
    inside = inside > high ? high : inside;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    V shifted = inside * 1.44269504f + round;
    V n = shifted - round;
    V r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    V p = ((((((r * 0.00138368f + 0.00837481f) * r + 0.04166823f) * r + 0.1666642f) * r + 0.49999992f) * r + 1.00000004f) *
           r) + 1.0f;
    V power = (V)(((Ints<float>)shifted << 23) + (127 << 23));
    V result = p * power;
    return x != x ? x : result;
}
// erf: x P(x^2) up to 1 (within 4e-11), 1 - exp(-x^2) Q(1 / (1 + 0.64 x)) beyond (within 3e-11), fitted for this file.
template <>
inline Vec<float> error_function<float>(Vec<float> x) {
    typedef Vec<float> V;
    V size = x < 0.0f ? -x : x;
    V far = size > 4.2f ? splat(4.2f) : size;
    V u = x * x;
    V near = x * (((((((u * -9.64172835e-06f + 1.12570195e-4f) * u - 8.48283831e-4f) * u + 5.22094605e-3f) * u -
                      2.68654002e-2f) * u + 1.1283782e-1f) * u - 3.76126384e-1f) * u + 1.12837917f);
    V t = 1.0f / (far * 0.64f + 1.0f);
    V tail = (((((t * 0.174142012f - 0.567669214f) * t + 0.482821722f) * t + 0.169377845f) * t + 0.382292496f) * t +
              0.359491181f) * t;
    V rest = 1.0f - exponential<float>(-far * far) * tail;
    rest = x < 0.0f ? -rest : rest;
    V result = size < 1.0f ? near : rest;
    return x != x ? x : result;
}
#endif

template <class A>
struct Act {
    int kind;
    A slope;
};

template <class A>
inline Vec<A> activate(Act<A> act, Vec<A> z) {
    Vec<A> zero = splat(A(0)), one = splat(A(1));
    switch (act.kind) {
        case kReLU:
            return choose<A>(z < zero, zero, z);
        case kLeakyReLU:
            return choose<A>(z < zero, z * splat(act.slope), z);
        case kGELU:
            return z * splat(A(0.5)) * (one + error_function<A>(z * splat(A(0.70710678118654752))));
        case kSiLU:
            return z / (one + exponential<A>(splat(A(0)) - z));
        default:
            return z;
    }
}

template <class A>
inline Vec<A> derivative(Act<A> act, Vec<A> z) {
    Vec<A> zero = splat(A(0)), one = splat(A(1));
    switch (act.kind) {
        case kReLU:
            return choose<A>(zero < z, one, zero);
        case kLeakyReLU:
            return choose<A>(zero < z, one, splat(act.slope));
        case kGELU: {
            Vec<A> density = exponential<A>(z * z * splat(A(-0.5))) * splat(A(0.39894228040143268));
            return splat(A(0.5)) * (one + error_function<A>(z * splat(A(0.70710678118654752)))) + z * density;
        }
        case kSiLU: {
            Vec<A> gate = one / (one + exponential<A>(splat(A(0)) - z));
            return gate * (one + z * (one - gate));
        }
        default:
            return one;
    }
}
