// A pretended device for .ci/elsewhere: its numbers lie in the main memory and the CPU's kernels calculate with them,
// but it is another device in all that PyTorch checks: what lies elsewhere is refused, NumPy cannot read it.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <cstring>

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
static const auto kind = c10::DeviceType::PrivateUse1;
static const c10::Device device(kind, 0);
static const c10::DispatchKeySet key(c10::DispatchKey::PrivateUse1);

// ---------------------------------------------------------------- memory, streams, hooks

static void free_it(void* p) { std::free(p); }

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t n) override {
    void* p = n ? std::malloc(n+64) : nullptr;
    return {p, p, &free_it, device};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_it; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
static Memory memory;
REGISTER_ALLOCATOR(kind, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface { // one device, one stream
  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto p = memory.allocate(n);
    if (s.data()) std::memcpy(p.get(), s.data(), std::min(n, s.nbytes()));
    s.set_data_ptr_noswap(std::move(p));
    s.set_nbytes(n);
  }
};
static Hooks hooks;
static const bool hooked = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---------------------------------------------------------------- there and back

static bool mine(const Tensor& t) { return t.defined() && t.device().type()==kind; }

static Tensor as_cpu(const Tensor& t) { // the same numbers, as the CPU sees them
  if (!mine(t)) return t;
  auto s = t.storage();
  auto* at = static_cast<char*>(const_cast<void*>(s.data()))+t.storage_offset()*t.element_size();
  return at::for_blob(at, t.sizes()).strides(t.strides()).deleter([s](void*){})
    .options(t.options().device(at::kCPU).requires_grad(false))
    .allocator(c10::GetCPUAllocator()).resizeable_storage().make_tensor();
}

static Tensor as_mine(const Tensor& t) { // a copy
  if (!t.defined()) return t;
  Tensor r = at::detail::empty_strided_generic(t.sizes(), t.strides(), &memory, key, t.scalar_type());
  as_cpu(r).copy_(t);
  return r;
}

static Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, key, c10::dtype_or_default(dtype), format);
}

static Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, key, c10::dtype_or_default(dtype));
}

static Tensor copy_from(const Tensor& self, const Tensor& to, bool) { as_cpu(to).copy_(as_cpu(self)); return to; }
static at::Scalar item(const Tensor& t) { return as_cpu(t).item(); }
static const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
static Tensor& set_place(Tensor& t, at::Storage s, int64_t off, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, s, off, size, stride);
}
static Tensor& set_storage(Tensor& t, at::Storage s) { return at::native::set_(t, s); }

// ---------------------------------------------------------------- everything else, on the CPU

static bool takes_places(const std::string& name) { // CUDA reads places from the CPU, too
  return name=="aten::index" || name.find("index_put")!=std::string::npos;
}

static void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  const auto n = schema.arguments().size(), first = stack->size()-n;
  std::vector<std::pair<Tensor, Tensor>> seen; // as the CPU sees it, and mine
  bool other = false;
  auto look = [&](const Tensor& t) {
    other |= t.defined() && !mine(t) && t.dim()>0;
    Tensor c = mine(t) && !t.numel() ? at::empty(t.sizes(), t.options().device(at::kCPU).requires_grad(false)) : as_cpu(t);
    if (mine(t)) seen.push_back({c, t});
    return c;
  };
  for (size_t i = first; i<first+n; i++) {
    auto& v = (*stack)[i];
    if (v.isTensor() && v.toTensor().defined()) v = look(v.toTensor());
    else if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(look(t));
      v = out;
    } else if (v.isOptionalTensorList()) {
      c10::List<MaybeTensor> out;
      const bool before = other;
      for (const MaybeTensor& t : v.toOptionalTensorVector()) out.push_back(t ? MaybeTensor(look(*t)) : t);
      if (takes_places(schema.name())) other = before;
      v = out;
    } else if (v.isDevice()) v = c10::IValue(c10::Device(at::kCPU));
    else if (v.isGenerator()) TORCH_CHECK(seen.empty(), "Expected a generator of the device dev, but found one of the CPU");
  }
  TORCH_CHECK(seen.empty() || !other, "Expected all tensors to be on the same device, but found at least two devices, "
              "dev:0 and cpu! (", schema.name(), ")");
  op.callBoxed(stack);
  auto back = [&](const Tensor& c) {
    for (auto& [cpu, my] : seen) if (c.is_same(cpu)) {
      if (my.sizes()!=c.sizes()) my.resize_(c.sizes());
      if (as_cpu(my).data_ptr()!=c.data_ptr()) as_cpu(my).copy_(c);
      return my;
    }
    return as_mine(c);
  };
  for (size_t i = stack->size()-schema.returns().size(); i<stack->size(); i++) {
    auto& v = (*stack)[i];
    if (v.isTensor()) v = back(v.toTensor());
    else if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(back(t));
      v = out;
    }
  }
}

static void same(const Tensor& x, const MaybeTensor& w) {
  TORCH_CHECK(!w || !w->defined() || mine(x)==mine(*w), "Input type (", x.device(), ") and weight type (", w->device(),
              ") should be the same");
}

static Tensor convolution(const Tensor& x, const Tensor& w, const MaybeTensor& b, c10::SymIntArrayRef stride,
                          c10::SymIntArrayRef pad, c10::SymIntArrayRef dilation, bool transposed,
                          c10::SymIntArrayRef out_pad, c10::SymInt groups) {
  same(x, w);
  same(x, b);
  auto bias = b ? MaybeTensor(as_cpu(*b)) : b;
  return as_mine(at::convolution_symint(as_cpu(x), as_cpu(w), bias, stride, pad, dilation, transposed, out_pad, groups));
}

static std::tuple<Tensor, Tensor, Tensor> convolution_back(
    const Tensor& g, const Tensor& x, const Tensor& w, c10::SymIntArrayRef stride, c10::SymIntArrayRef pad,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef out_pad, c10::SymInt groups, std::array<bool, 3> m) {
  std::vector<c10::SymInt> bias = {transposed ? w.sym_size(1)*groups : w.sym_size(0)};
  auto [a, b, c] = at::convolution_backward_symint(as_cpu(g), as_cpu(x), as_cpu(w), at::OptionalSymIntArrayRef(bias),
                                                   stride, pad, dilation, transposed, out_pad, groups, m);
  return {as_mine(a), as_mine(b), as_mine(c)};
}

static int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, double, bool,
                               std::optional<double>, bool) { return static_cast<int64_t>(sdp::SDPBackend::math); }
namespace at::native { REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  using Sizes = c10::IntArrayRef;
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_place);
  m.impl("as_strided", static_cast<Tensor(*)(const Tensor&, Sizes, Sizes, std::optional<int64_t>)>(
    &at::native::as_strided_tensorimpl));
  m.impl("view", static_cast<Tensor(*)(const Tensor&, Sizes)>(&at::native::view));
  m.impl("_reshape_alias", static_cast<Tensor(*)(const Tensor&, Sizes, Sizes)>(&at::native::_reshape_alias));
  m.impl("unfold", &at::native::unfold);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_back);
  for (auto name : {"native_group_norm", "native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward",
                    "replication_pad2d"}) // else they are put together from others, which lose the order of channels
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}
