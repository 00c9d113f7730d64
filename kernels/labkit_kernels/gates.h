// The activations of gated layers, on vectors of floats.
#pragma once

#include "simd.h"

namespace labkit::gates {

constexpr float LOG2E = 1.4426950408889634f;

// x / (1 + e^-y). The bound keeps 2^z finite: beyond it the quotient is smaller than any float that matters.
inline vf times_sigmoid(vf x, vf y) { return x / (exp2v(min(y * -LOG2E, splat(126.f))) + 1.f); }

struct Silu {
    static vf of(vf x) { return times_sigmoid(x, x); }
};

struct GeluTanh {  // x/2 (1 + tanh u) = x sigmoid(2u)
    static vf of(vf x) { return times_sigmoid(x, x * (x * x * 0.0713548162726f + 1.59576912160573f)); }
};

struct Gelu {  // erfc by a Chebyshev fit (Numerical Recipes), relative error 1.2e-7 also where it is tiny
    static vf of(vf x) {
        vf z = abs(x) * 0.70710678118654752f;
        vf t = 2.f / (z + 2.f);
        vf p = t * 0.17087277f - 0.82215223f;
        p = p * t + 1.48851587f;
        p = p * t - 1.13520398f;
        p = p * t + 0.27886807f;
        p = p * t - 0.18628806f;
        p = p * t + 0.09678418f;
        p = p * t + 0.37409196f;
        p = p * t + 1.00002368f;
        p = p * t - 1.26551223f;
        vf rest = t * exp2v((p - z * z) * LOG2E);
        return x * 0.5f * (x < 0.f ? rest : 2.f - rest);
    }
};

}  // namespace labkit::gates
