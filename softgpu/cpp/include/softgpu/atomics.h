// Atomics, which return the old value, as on a GPU. They are host atomics, because launches of several host threads may share
// memory.
#pragma once
#include <string.h>

namespace softgpu {

template <class T, class Function> inline T atomic_update(T* address, Function function) {
    T old, wanted;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        wanted = function(old);
    } while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

}  // namespace softgpu

#define SOFTGPU_INTEGER_ATOMICS(T)                                                                       \
    inline T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); } \
    inline T atomicSub(T* address, T value) { return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED); } \
    inline T atomicOr(T* address, T value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }   \
    inline T atomicAnd(T* address, T value) { return __atomic_fetch_and(address, value, __ATOMIC_RELAXED); } \
    inline T atomicExch(T* address, T value) { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); } \
    inline T atomicMax(T* address, T value) {                                                            \
        return softgpu::atomic_update(address, [=](T old) { return old > value ? old : value; });        \
    }                                                                                                    \
    inline T atomicMin(T* address, T value) {                                                            \
        return softgpu::atomic_update(address, [=](T old) { return old < value ? old : value; });        \
    }                                                                                                    \
    inline T atomicCAS(T* address, T expected, T value) {                                                \
        __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
        return expected;                                                                                 \
    }

SOFTGPU_INTEGER_ATOMICS(int)
SOFTGPU_INTEGER_ATOMICS(unsigned)
SOFTGPU_INTEGER_ATOMICS(unsigned long long)
#undef SOFTGPU_INTEGER_ATOMICS

inline float atomicAdd(float* address, float value) {
    return softgpu::atomic_update(address, [=](float old) { return old + value; });
}
inline float atomicExch(float* address, float value) {
    return softgpu::atomic_update(address, [=](float) { return value; });
}
