#include "tensors.h"

#include <stdexcept>

namespace kvarn {
namespace {

void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("kvarn kernels: torch refused a tensor query");
}

std::string shape_of(const View& view) {
  std::string text = "[";
  for (int64_t i = 0; i < view.dims; ++i) text += (i ? ", " : "") + std::to_string(view.sizes[i]);
  return text + "]";
}

}  // namespace

View::View(const char* name, const Tensor& tensor) : name(name) {
  AtenTensorHandle handle = tensor.get();
  int32_t device;
  int64_t *size_values, *stride_values;
  check(aoti_torch_get_device_type(handle, &device));
  check(aoti_torch_get_data_ptr(handle, &data));
  check(aoti_torch_get_dim(handle, &dims));
  check(aoti_torch_get_sizes(handle, &size_values));
  check(aoti_torch_get_strides(handle, &stride_values));
  check(aoti_torch_get_dtype(handle, &dtype));
  sizes = size_values;
  strides = stride_values;
  if (device != aoti_torch_device_type_cpu()) fail("a CPU tensor like the other arguments");
}

void View::fail(const std::string& expected) const {
  throw std::runtime_error("kvarn kernels: " + std::string(name) + " of shape " + shape_of(*this) + ": expected " +
                           expected);
}

void View::expect_dims(int64_t expected, const char* shape) const {
  if (dims != expected) fail(shape);
}

void View::expect_size(int64_t dim, int64_t expected, const char* why) const {
  if (size(dim) == expected) return;
  fail("size " + std::to_string(expected) + " in dimension " + std::to_string(dim) + " (" + why + ")");
}

void View::expect_float() const {
  if (dtype != aoti_torch_dtype_float32() && !is_bfloat16())
    fail("float32 or bfloat16; for other types set KVARN_KERNELS=reference");
}

void View::expect_dtype(int32_t expected, const char* expected_name) const {
  if (dtype != expected) fail(std::string("dtype ") + expected_name);
}

void View::expect_like(const View& other) const {
  if (dtype != other.dtype) fail(std::string("the dtype of ") + other.name);
}

void View::expect_contiguous_tail(int64_t count) const {
  int64_t expected = 1;
  for (int64_t dim = dims - 1; dim >= dims - count; --dim) {
    if (sizes[dim] != 1 && strides[dim] != expected)
      fail("the last " + std::to_string(count) + " dimensions contiguous");
    expected *= sizes[dim] > 0 ? sizes[dim] : 1;  // as torch counts
  }
}

void View::expect_int32(int64_t expected_dims, const char* shape) const {
  expect_dims(expected_dims, shape);
  expect_dtype(aoti_torch_dtype_int32(), "int32");
  expect_contiguous_tail(expected_dims);
}

CacheShape::CacheShape(const View& kv, const View& rows) : is_int8(kv.dtype == aoti_torch_dtype_uint8()) {
  const int64_t dim = rows.size(2);
  if (is_int8) {
    kv.expect_dims(4, "[N, 2, Hkv, B * (D + 4)] bytes");
    if (dim % 8 || dim > 1024) kv.fail("rows with a head dimension that is a multiple of 8 up to 1024");
    if (kv.size(3) % (dim + 4)) kv.fail("bytes of whole slots, " + std::to_string(dim + 4) + " each");
    if (kv.stride(0) % 4) kv.fail("blocks at whole floats");
    block_size = kv.size(3) / (dim + 4);
  } else {
    kv.expect_dims(5, "[N, 2, Hkv, B, D]");
    kv.expect_like(rows);
    kv.expect_size(4, dim, "the head dimension");
    block_size = kv.size(3);
  }
  kv.expect_contiguous_tail(kv.dims - 1);
  kv.expect_size(1, 2, "keys and values");
}

Tensor empty(const View& like, std::initializer_list<int64_t> sizes) { return empty(sizes, like.dtype); }

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[8], next = 1;
  for (int64_t dim = (int64_t)sizes.size() - 1; dim >= 0; --dim) {
    strides[dim] = next;
    next *= sizes.begin()[dim];
  }
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.begin(), strides, dtype,
                                 aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace kvarn
