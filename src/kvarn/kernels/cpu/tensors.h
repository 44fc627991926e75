// Looking at torch tensors through its stable ABI: everything a kernel needs to know, read once, checked with messages
// that say what was got and what was expected.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>

namespace kvarn {

using torch::stable::Tensor;

// Shape of a tensor argument; valid while the tensor lives.
struct View {
  const char* name;
  void* data;
  int64_t dims;
  const int64_t *sizes, *strides;
  int32_t dtype;

  View(const char* name, const Tensor& tensor);

  int64_t size(int64_t dim) const { return sizes[dim < 0 ? dims + dim : dim]; }
  int64_t stride(int64_t dim) const { return strides[dim < 0 ? dims + dim : dim]; }
  bool is_bfloat16() const { return dtype == aoti_torch_dtype_bfloat16(); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  void expect_dims(int64_t expected, const char* shape) const;
  void expect_size(int64_t dim, int64_t expected, const char* why) const;
  void expect_float() const;  // float32 or bfloat16
  void expect_dtype(int32_t expected, const char* expected_name) const;
  void expect_like(const View& other) const;  // the same dtype
  // The last `count` dimensions lie in memory without gaps; the ones before may be strided.
  void expect_contiguous_tail(int64_t count) const;
  void expect_int32(int64_t expected_dims, const char* shape) const;  // and contiguous

  [[noreturn]] void fail(const std::string& expected) const;
};

// One layer of a KV pool, checked against a query or key [T, heads, D]: [N, 2, Hkv, B, D] of its dtype, or
// [N, 2, Hkv, B * (D + 4)] uint8: B rows of int8, then their B float32 scales.
struct CacheShape {
  bool is_int8;
  int64_t block_size;

  CacheShape(const View& kv, const View& rows);
};

// An uninitialised contiguous CPU tensor of the view's dtype.
Tensor empty(const View& like, std::initializer_list<int64_t> sizes);
Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype);

}  // namespace kvarn
