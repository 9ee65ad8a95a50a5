// What a steady step asks of every tensor and group, in C++. docs/design.md, "What a step costs the host", has figures.
//
// A fingerprint is a run of 64-bit numbers: identity, address, shape, dtype, device and layout of every parameter,
// gradient and state tensor, in the order of the groups. Recording notes them; matching walks the same way again and
// stops at the first number that differs. It says the same as fingerprint.py, which is the definition, and whatever it
// does not know (other subclasses of tensors than DTensor, sparse gradients, groups that are no dicts) it leaves to it:
// no match.
//
// host_walk.py compiles this file for the torch and Python at hand. Everything runs under Python's lock, keeps no
// reference (who records keeps the parameters alive) and calls no Python code. Thousands of tensors are shared with other
// threads, see host_helpers.h.

#include <Python.h>
#include <c10/core/impl/COWDeleter.h>
#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "host_helpers.h"

namespace {

// Whether a plan is made for a gradient of a parameter, and whether that may be missing without another plan.
enum Planned : int64_t { NO_GRAD = 0, GRAD = 1, GRAD_MAY_MISS = 2 };

// Parameters whose gradients are planned and missing now, in the order of the groups, and what stands in for those.
using Awaited = std::vector<std::pair<PyObject*, const c10::TensorImpl*>>;

struct Recorder {
  std::vector<int64_t>& numbers;
  bool may_miss = false;
  const Awaited* awaited = nullptr;
  size_t next_awaited = 0;

  bool see(int64_t number) {
    numbers.push_back(number);
    return true;
  }
  bool see_presence(PyObject* param, bool has_elements, bool has_grad, bool& planned,
                    const c10::TensorImpl*& stand_in) {
    planned = has_grad;
    if (!has_grad && awaited != nullptr && next_awaited < awaited->size() && (*awaited)[next_awaited].first == param) {
      planned = true;
      stand_in = (*awaited)[next_awaited++].second;
    }
    return see(!planned ? NO_GRAD : may_miss && has_elements ? GRAD_MAY_MISS : GRAD);
  }
};

struct Matcher {
  const int64_t* next;
  const int64_t* end;
  Matcher(const int64_t* begin, const int64_t* end) : next(begin), end(end) {}
  explicit Matcher(const std::vector<int64_t>& all) : Matcher(all.data(), all.data() + all.size()) {}
  bool see(int64_t number) { return next != end && *next++ == number; }
  bool see_presence(PyObject*, bool, bool has_grad, bool& planned, const c10::TensorImpl*&) {
    if (done()) return false;
    const int64_t known = *next++;
    planned = known != NO_GRAD;
    return has_grad ? planned : known != GRAD;
  }
  bool skip(int64_t count) {
    if (end - next < count) return false;
    next += count;
    return true;
  }
  bool done() const { return next == end; }
};

constexpr int64_t WIDE_BYTES = 16, NO_ELEMENTS = 16;  // as in buckets.py

int64_t as_number(const void* address) { return reinterpret_cast<int64_t>(address); }

// Thousands of tensors lie all over memory, and each hides its address three pointers away. So items are touched before
// their turn, one pointer deeper every STRIDE items, by as many `levels` as there are: a sixth less time for 10,000.
constexpr size_t STRIDE = 8;

template <class Item, class Visit, class... Levels>
bool for_each_ahead(const Item* begin, const Item* end, Visit visit, Levels... levels) {
  const size_t count = end - begin;
  for (size_t i = 0; i < count; i++) {
    size_t ahead = i + STRIDE * sizeof...(levels);
    ((ahead < count ? levels(begin[ahead]) : void(), ahead -= STRIDE), ...);
    if (!visit(begin[i])) return false;
  }
  return true;
}

void touch(const void* address) { __builtin_prefetch(address); }

void touch_tensor(const c10::TensorImpl* tensor) {
  for (size_t at = 0; at < sizeof(*tensor); at += 64) touch(reinterpret_cast<const char*>(tensor) + at);
}

void touch_memory(const c10::TensorImpl* tensor) {
  touch(tensor->autograd_meta());
  touch(tensor->unsafe_storage().unsafeGetStorageImpl());
}

// A DTensor has no memory: it holds this rank's shard, a tensor, and what is said of its distribution.
struct DTensors {
  PyTypeObject* type = nullptr;  // until somebody knows it
  Py_ssize_t shard = 0, spec = 0;

  bool has(PyObject* object) const { return Py_TYPE(object) == type; }
  static PyObject* slot(PyObject* object, Py_ssize_t at) {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + at);
  }
};

DTensors dtensors;

const c10::TensorImpl* outer_of(PyObject* object) { return THPVariable_Unpack(object).unsafeGetTensorImpl(); }

// A plain tensor or parameter, or the shard of a DTensor if it is one; null for anything else: another subclass may have
// attributes of its own making.
const c10::TensorImpl* tensor_of(PyObject* object) {
  PyObject* plain = dtensors.has(object) ? DTensors::slot(object, dtensors.shard) : object;
  return plain != nullptr && THPVariable_CheckExact(plain) ? outer_of(plain) : nullptr;
}

// The gradient of a DTensor, null where that is none.
PyObject* dtensor_of_grad(PyObject* param) {
  PyObject* grad = outer_of(param)->grad().unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  return grad != nullptr && dtensors.has(grad) ? grad : nullptr;
}

// What a dict has there; null where it has nothing, or looking failed.
PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) PyErr_Clear();
  return value;
}

// Sees the object, and that it is one that the walk knows.
bool see_object(Recorder& sink, PyObject* object) {
  return tensor_of(object) != nullptr && sink.see(as_number(object));
}
bool see_object(Matcher& sink, PyObject* object) { return sink.see(as_number(object)); }  // the very one of then

// Where it begins, to be written to. May throw, as Tensor.data_ptr() does where there is no memory.
const void* address_of(Recorder&, const c10::TensorImpl* tensor) {
  return const_cast<c10::TensorImpl*>(tensor)->mutable_data();
}

// The same for matching, null for a lazy clone: it would get memory of its own here, which is nothing for a helper, whose
// current stream is another. Recording does it, when nothing matches.
const void* address_of(Matcher&, const c10::TensorImpl* tensor) {
  const bool is_shared = tensor->storage().data_ptr().get_deleter() == &c10::impl::cow::cow_deleter;
  return is_shared ? nullptr : tensor->data();
}

template <class Sink>
bool see_address(Sink& sink, const c10::TensorImpl* tensor) {
  const bool has_memory = tensor->storage().data() != nullptr || tensor->numel() == 0;
  return has_memory && sink.see(as_number(address_of(sink, tensor)));
}

template <class Sink>
bool see_all(Sink& sink, c10::IntArrayRef numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [&](int64_t number) { return sink.see(number); });
}

// Wrappers around other tensors, and views that are more than a look at memory.
constexpr c10::DispatchKeySet NOT_PLAIN({c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                         c10::DispatchKey::ZeroTensor});

// Dtype, device, sizes, and strides of what is not contiguous, as if it were on `device`; false for what only Python
// understands.
template <class Sink>
bool see_layout(Sink& sink, const c10::TensorImpl* tensor, c10::Device device) {
  if (tensor->key_set().has_any(NOT_PLAIN) || tensor->layout() != c10::kStrided) return false;
  const bool contiguous = tensor->is_contiguous();
  const int64_t kind = static_cast<int64_t>(c10::typeMetaToScalarType(tensor->dtype())) |
                       static_cast<int64_t>(device.type()) << 8 |
                       static_cast<int64_t>(static_cast<uint8_t>(device.index())) << 16 |
                       static_cast<int64_t>(contiguous) << 24 | tensor->dim() << 32;
  return sink.see(kind) && see_all(sink, tensor->sizes()) && (contiguous || see_all(sink, tensor->strides()));
}

template <class Sink>
bool see_layout(Sink& sink, const c10::TensorImpl* tensor) {
  return see_layout(sink, tensor, tensor->device());
}

// Past what see_layout saw.
bool skip_layout(Matcher& sink) {
  if (sink.done()) return false;
  const int64_t kind = *sink.next, dims = kind >> 32;
  const bool contiguous = (kind >> 24 & 1) != 0;
  return sink.skip(1 + dims + (contiguous ? 0 : dims));
}

// Of a gradient that is planned and missing: recorded as what stands in for it, on the parameter's device and as well
// aligned as can be; matched by whatever it was.
bool see_missing(Recorder& sink, const c10::TensorImpl* stand_in, const c10::TensorImpl* param) {
  return see_layout(sink, stand_in, param->device()) && sink.see(0);
}
bool see_missing(Matcher& sink, const c10::TensorImpl*, const c10::TensorImpl*) {
  return skip_layout(sink) && sink.skip(1);
}

template <class Sink>
bool collect_params(Sink& sink, PyObject* groups, std::vector<PyObject*>& params) {
  static PyObject* const key = PyUnicode_InternFromString("params");
  if (!PyList_Check(groups) || !sink.see(PyList_GET_SIZE(groups))) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); i++) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    PyObject* some = PyDict_Check(group) ? item(group, key) : nullptr;
    if (some == nullptr || !(PyList_Check(some) || PyTuple_Check(some))) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(some);
    if (!sink.see(count)) return false;
    for (Py_ssize_t j = 0; j < count; j++) {
      params.push_back(PySequence_Fast_GET_ITEM(some, j));
      if (!see_object(sink, params.back())) return false;
    }
  }
  return true;
}

// A number that no other state of any dict has: by it a group is compared in 5 ns instead of 100, and a parameter's
// state without a look at its keys. 0 from Python 3.13 on, where some writes leave it as it was.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
int64_t version_of([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
  return static_cast<int64_t>(reinterpret_cast<PyDictObject*>(dict)->ma_version_tag);
#else
  return 0;
#endif
}
#pragma GCC diagnostic pop

template <class Sink>
bool collect_state(Sink& sink, PyObject* state, std::vector<PyObject*>& entries, std::vector<PyObject*>& tensors) {
  PyObject *param, *entry, *name, *value;
  Py_ssize_t at = 0;
  if (!PyDict_Check(state)) return false;
  while (PyDict_Next(state, &at, &param, &entry)) {
    entries.push_back(entry);
    if (!sink.see(as_number(param))) return false;
  }
  const auto collect = [&](PyObject* entry) {
    Py_ssize_t at = 0;
    if (!PyDict_Check(entry)) return false;
    while (PyDict_Next(entry, &at, &name, &value)) {
      tensors.push_back(value);
      if (!sink.see(as_number(name)) || !see_object(sink, value)) return false;
    }
    return true;
  };
  const auto touch_entry = [](PyObject* entry) { touch(entry); };
  const auto touch_keys = [](PyObject* entry) {
    if (!PyDict_Check(entry)) return;
    const char* keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(entry)->ma_keys);
    touch(keys), touch(keys + 64);
  };
  return for_each_ahead(entries.data(), entries.data() + entries.size(), collect, touch_entry, touch_keys);
}

// The memory of a tensor on the CPU.
template <class Number>
struct Memory {
  Number* values;
  int64_t room;
};

// Throws for any other tensor.
template <class Number>
Memory<Number> memory_of(PyObject* object, const char* name) {
  TORCH_CHECK(THPVariable_CheckExact(object), name, " must be a tensor");
  const at::Tensor& tensor = THPVariable_Unpack(object);
  const auto type = c10::CppTypeToScalarType<Number>::value;
  TORCH_CHECK(tensor.scalar_type() == type && tensor.is_cpu() && tensor.is_contiguous(), name,
              " must be a contiguous tensor of ", type, " on the CPU");
  return {tensor.mutable_data_ptr<Number>(), tensor.numel()};
}

// Where the gradients' addresses go, in the order of the groups: they may differ from step to step.
using Addresses = Memory<int64_t>;

void touch_object(PyObject* object) { touch(object); }
void touch_tensor_of(PyObject* object) {
  if (const c10::TensorImpl* tensor = tensor_of(object)) touch_tensor(tensor);
}
void touch_memory_of(PyObject* object) {
  if (const c10::TensorImpl* tensor = tensor_of(object)) touch_memory(tensor);
}
void touch_outer_of(PyObject* object) { touch_tensor(outer_of(object)); }
void touch_version_of(PyObject* object) {
  // A version is a pointer to its counter, and nothing else; were it not, somewhere else would be touched, in vain.
  touch(*reinterpret_cast<const void* const*>(&outer_of(object)->version_counter()));
}

// Parameters [begin, end) and their gradients, of which the first has its address at `at`, which moves on. `distributed`:
// what trains decides about the other ranks' sums, gradient or not.
template <class Sink>
bool see_params(Sink& sink, PyObject* const* begin, PyObject* const* end, bool distributed, const Addresses& addresses,
                int64_t& at) {
  struct Grad {
    const c10::TensorImpl* tensor;  // null where it is planned and missing
    const c10::TensorImpl* stand_in;
    const c10::TensorImpl* param;
  };
  std::vector<Grad> grads;
  const auto see_param = [&](PyObject* object) {
    const c10::TensorImpl *outer = outer_of(object), *param = tensor_of(object);
    if (param == nullptr || (distributed && !sink.see(outer->requires_grad()))) return false;
    if (outer != param && !sink.see(as_number(DTensors::slot(object, dtensors.spec)))) return false;
    const at::Tensor& grad = outer->grad();
    bool planned = false;
    const c10::TensorImpl *tensor = nullptr, *stand_in = nullptr;
    if (!sink.see_presence(object, param->numel() != 0, grad.defined(), planned, stand_in)) return false;
    if (grad.defined() && outer == param) {
      tensor = grad.unsafeGetTensorImpl();
    } else if (grad.defined()) {
      PyObject* shards = dtensor_of_grad(object);
      tensor = shards == nullptr ? nullptr : tensor_of(shards);
      if (tensor == nullptr) return false;
    }
    if (planned) grads.push_back({tensor, stand_in, param});
    return see_layout(sink, param) && see_address(sink, param);
  };
  const auto see_grad = [&](const Grad& grad) {
    if (at == addresses.room) return false;
    if (grad.tensor == nullptr) {
      addresses.values[at++] = 0;
      return see_missing(sink, grad.stand_in, grad.param);
    }
    const bool has_elements = grad.tensor->numel() != 0;
    if (!see_layout(sink, grad.tensor) || (has_elements && grad.tensor->storage().data() == nullptr)) return false;
    const int64_t address = as_number(address_of(sink, grad.tensor));
    if (address == 0 && has_elements) return false;  // a lazy clone, whose memory Python is to make
    addresses.values[at++] = address == 0 ? NO_ELEMENTS : address;
    return sink.see(address % WIDE_BYTES);
  };
  const auto touch_grad = [](const Grad& grad) {
    if (grad.tensor != nullptr) touch_tensor(grad.tensor);
  };
  const auto touch_memory_of_grad = [](const Grad& grad) {
    if (grad.tensor != nullptr) touch_memory(grad.tensor);
  };
  return for_each_ahead(begin, end, see_param, touch_object, touch_tensor_of, touch_memory_of) &&
         for_each_ahead(grads.data(), grads.data() + grads.size(), see_grad, touch_grad, touch_memory_of_grad);
}

// State tensors [begin, end).
template <class Sink>
bool see_state(Sink& sink, PyObject* const* begin, PyObject* const* end) {
  const auto see = [&](PyObject* object) {
    const c10::TensorImpl* tensor = tensor_of(object);
    return tensor != nullptr && see_layout(sink, tensor) && see_address(sink, tensor);
  };
  return for_each_ahead(begin, end, see, touch_object, touch_tensor_of, touch_memory_of);
}

// Objects that one thread looks at in a row.
constexpr size_t PART = 512;

size_t parts_of(const std::vector<PyObject*>& objects) { return (objects.size() + PART - 1) / PART; }

// The objects of one part.
std::pair<PyObject* const*, PyObject* const*> range_of(const std::vector<PyObject*>& objects, size_t part) {
  return {objects.data() + part * PART, objects.data() + std::min((part + 1) * PART, objects.size())};
}

// The tensors of all parameters' state, and the versions of the dicts in which they were found: while those are the
// same, so are the tensors.
struct State {
  int64_t version = 0;
  std::vector<PyObject*> entries, tensors;
  std::vector<int64_t> versions;

  template <class Sink>
  bool collect(Sink& sink, PyObject* state) {
    entries.clear(), tensors.clear(), versions.clear();
    version = 0;
    if (!collect_state(sink, state, entries, tensors)) return false;
    version = version_of(state);
    for (PyObject* entry : entries) versions.push_back(version_of(entry));
    return true;
  }

  bool is_untouched(PyObject* state) const {
    if (version == 0 || !PyDict_Check(state) || version_of(state) != version) return false;
    return Helpers::all(parts_of(entries), [&](size_t part) {
      const int64_t* known = versions.data() + part * PART;
      const auto is_same = [&](PyObject* entry) { return version_of(entry) == *known++; };
      const auto [begin, end] = range_of(entries, part);
      return for_each_ahead(begin, end, is_same, touch_object);
    });
  }
};

// What a walk saw: the objects, and part by part what they are like, parameters first.
struct Recording {
  static constexpr const char* NAME = "fused_dals.recording";
  std::vector<int64_t> params, state_tensors, numbers;
  bool distributed = false;          // some are DTensors
  std::vector<size_t> starts;        // in numbers, of every part, and where the last one ends
  std::vector<int64_t> first_grads;  // of every part, and where the last one ends
  State state;
};

template <class Sink>
bool see_part(Sink& sink, const Recording& recording, const std::vector<PyObject*>& params, size_t part,
              const Addresses& addresses, int64_t& at) {
  const std::vector<PyObject*>& state = recording.state.tensors;
  const bool of_params = part < parts_of(params);
  const auto [begin, end] = of_params ? range_of(params, part) : range_of(state, part - parts_of(params));
  return of_params ? see_params(sink, begin, end, recording.distributed, addresses, at) : see_state(sink, begin, end);
}

bool record_walk(Recording& recording, PyObject* groups, PyObject* state, const Addresses& addresses, bool may_miss,
                 const Awaited& awaited) {
  Recorder of_params{recording.params}, of_state{recording.state_tensors};
  Recorder numbers{recording.numbers, may_miss, &awaited};
  std::vector<PyObject*> params;
  if (!collect_params(of_params, groups, params) || !recording.state.collect(of_state, state)) return false;
  int64_t at = 0;
  const size_t parts = parts_of(params) + parts_of(recording.state.tensors);
  for (size_t part = 0; part <= parts; part++) {
    recording.starts.push_back(recording.numbers.size());
    recording.first_grads.push_back(at);
    if (part < parts && !see_part(numbers, recording, params, part, addresses, at)) return false;
  }
  return true;
}

bool match_walk(Recording& recording, PyObject* groups, PyObject* state, const Addresses& addresses) {
  Matcher of_params{recording.params}, of_state{recording.state_tensors};
  std::vector<PyObject*> params;
  if (!collect_params(of_params, groups, params) || !of_params.done()) return false;
  if (!recording.state.is_untouched(state)) {
    if (!recording.state.collect(of_state, state) || !of_state.done()) {
      recording.state.version = 0;  // these are not the tensors that were recorded
      return false;
    }
  }
  if (addresses.room != recording.first_grads.back()) return false;
  return Helpers::all(recording.starts.size() - 1, [&](size_t part) {
    const int64_t* numbers = recording.numbers.data();
    Matcher sink{numbers + recording.starts[part], numbers + recording.starts[part + 1]};
    int64_t at = recording.first_grads[part];
    return see_part(sink, recording, params, part, addresses, at) && sink.done();
  });
}

// A function with a fixed number of arguments, whose C++ errors become Python's RuntimeError.
template <Py_ssize_t expected, PyObject* (*function)(PyObject* const*)>
PyObject* checked(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  try {
    return function(arguments);
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// know_dtensors(type): DTensors are this class from now on. False where its objects do not hold their shard and their
// distribution in slots, so that only Python can find them.
PyObject* know_dtensors(PyObject* const* arguments) {
  TORCH_CHECK(PyType_Check(arguments[0]), "expected a class");
  auto* type = reinterpret_cast<PyTypeObject*>(arguments[0]);
  const auto offset_of = [&](const char* name) -> Py_ssize_t {
    PyObject* found = PyObject_GetAttrString(arguments[0], name);
    if (found == nullptr) PyErr_Clear();
    const bool is_member = found != nullptr && Py_TYPE(found) == &PyMemberDescr_Type && PyDescr_TYPE(found) == type;
    const PyMemberDef* member = is_member ? reinterpret_cast<PyMemberDescrObject*>(found)->d_member : nullptr;
    Py_XDECREF(found);  // the class keeps it
    return member != nullptr && member->type == T_OBJECT_EX ? member->offset : 0;
  };
  const DTensors known{type, offset_of("_local_tensor"), offset_of("_spec")};
  const bool are_slots = known.shard != 0 && known.spec != 0;
  if (are_slots && dtensors.type != type) {
    Py_INCREF(type);  // for good
    dtensors = known;
  }
  return PyBool_FromLong(are_slots);
}

// are_settled(groups): whether every DTensor's gradient is a DTensor of the very same spec, as FSDP2 makes them. False
// says nothing: specs may be equal.
PyObject* are_settled(PyObject* const* arguments) {
  std::vector<int64_t> numbers;
  Recorder sink{numbers};
  std::vector<PyObject*> params;
  if (!collect_params(sink, arguments[0], params)) Py_RETURN_FALSE;
  const auto spec_of = [](PyObject* object) { return DTensors::slot(object, dtensors.spec); };
  const auto is_settled = [&](PyObject* param) {
    if (!dtensors.has(param) || !outer_of(param)->grad().defined()) return true;
    PyObject* grad = dtensor_of_grad(param);
    return grad != nullptr && spec_of(grad) == spec_of(param);
  };
  return PyBool_FromLong(std::all_of(params.begin(), params.end(), is_settled));
}

// record(groups, state, addresses, distributed, awaited): what a walk saw, None where only Python understands it.
// `addresses`, int64 on the CPU with room for all planned gradients, is filled in, with 0 for a missing one;
// `distributed`: there are DTensors; `awaited`: None where there have to be the same gradients at every step, else a list
// of the parameters, in the order of the groups, whose gradients are planned although they miss now, each in a tuple with
// a tensor that is laid out like the gradient.
PyObject* record(PyObject* const* arguments) {
  auto recording = std::make_unique<Recording>();
  recording->distributed = arguments[3] == Py_True;
  const auto addresses = memory_of<int64_t>(arguments[2], "addresses");
  const bool may_miss = arguments[4] != Py_None;
  TORCH_CHECK(!may_miss || PyList_Check(arguments[4]), "awaited must be a list or None");
  Awaited awaited;
  for (Py_ssize_t i = 0; may_miss && i < PyList_GET_SIZE(arguments[4]); i++) {
    PyObject* pair = PyList_GET_ITEM(arguments[4], i);
    TORCH_CHECK(PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2 && THPVariable_Check(PyTuple_GET_ITEM(pair, 1)),
                "awaited must hold (parameter, tensor)");
    awaited.emplace_back(PyTuple_GET_ITEM(pair, 0), outer_of(PyTuple_GET_ITEM(pair, 1)));
  }
  if (!record_walk(*recording, arguments[0], arguments[1], addresses, may_miss, awaited)) Py_RETURN_NONE;
  PyObject* capsule = PyCapsule_New(recording.get(), Recording::NAME, [](PyObject* capsule) {
    delete static_cast<Recording*>(PyCapsule_GetPointer(capsule, Recording::NAME));
  });
  if (capsule != nullptr) recording.release();
  return capsule;
}

// matches(recording, groups, state, addresses): whether a walk sees what was recorded; then `addresses` are of now, 0 for
// a gradient that is missing and may be.
PyObject* matches(PyObject* const* arguments) {
  TORCH_CHECK(PyCapsule_IsValid(arguments[0], Recording::NAME), "recording must be what record returned");
  auto& recording = *static_cast<Recording*>(PyCapsule_GetPointer(arguments[0], Recording::NAME));
  const auto addresses = memory_of<int64_t>(arguments[3], "addresses");
  return PyBool_FromLong(match_walk(recording, arguments[1], arguments[2], addresses));
}

bool same_items(PyObject* a, PyObject* b) {
  if (!(PyList_Check(a) || PyTuple_Check(a)) || PySequence_Fast_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(b); i++)
    if (PySequence_Fast_GET_ITEM(a, i) != PyTuple_GET_ITEM(b, i)) return false;
  return true;
}

// Whether a dict has these very keys and values, in this order; the value of "lr" is not looked at.
bool same_entries(PyObject* group, PyObject* keys, PyObject* values) {
  if (PyDict_GET_SIZE(group) != PyTuple_GET_SIZE(values) || PyTuple_GET_SIZE(keys) != PyTuple_GET_SIZE(values)) {
    return false;
  }
  static PyObject* const lr = PyUnicode_InternFromString("lr");
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; PyDict_Next(group, &at, &key, &value); i++)
    if (key != PyTuple_GET_ITEM(keys, i) || (value != PyTuple_GET_ITEM(values, i) && key != lr)) return false;
  return true;
}

// Whether a group's "param_names" hold these very names; None stands for no names.
bool same_names(PyObject* group, PyObject* names) {
  static PyObject* const key = PyUnicode_InternFromString("param_names");
  if (names == Py_None) return true;
  PyObject* now = item(group, key);
  return now != nullptr && PyTuple_Check(names) && same_items(now, names);
}

// same_groups(groups, known, versions): whether each group is what known[i] = (keys, values, names) says. 0: no; 1: yes,
// but for "lr" perhaps; 2: no dict was written to since the last call. `versions`, a bytearray of 8 bytes a group, zeros
// at first, keeps the versions of the dicts in between.
PyObject* same_groups(PyObject* const* arguments) {
  PyObject *groups = arguments[0], *known = arguments[1], *versions = arguments[2];
  TORCH_CHECK(PyList_Check(known), "known must be a list");
  const Py_ssize_t count = PyList_GET_SIZE(known);
  TORCH_CHECK(PyByteArray_Check(versions) && PyByteArray_GET_SIZE(versions) == count * Py_ssize_t(sizeof(int64_t)),
              "versions must be a bytearray of 8 bytes a group");
  if (!PyList_Check(groups) || PyList_GET_SIZE(groups) != count) return PyLong_FromLong(0);
  auto* seen = reinterpret_cast<int64_t*>(PyByteArray_AS_STRING(versions));
  bool untouched = true;
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *group = PyList_GET_ITEM(groups, i), *expected = PyList_GET_ITEM(known, i);
    TORCH_CHECK(PyTuple_Check(expected) && PyTuple_GET_SIZE(expected) == 3, "known must hold (keys, values, names)");
    PyObject *keys = PyTuple_GET_ITEM(expected, 0), *values = PyTuple_GET_ITEM(expected, 1);
    TORCH_CHECK(PyTuple_Check(keys) && PyTuple_Check(values), "keys and values must be tuples");
    if (!PyDict_Check(group)) return PyLong_FromLong(0);
    const int64_t version = version_of(group);
    if (version == 0 || version != seen[i]) {
      if (!same_entries(group, keys, values)) return PyLong_FromLong(0);
      seen[i] = version;
      untouched = false;
    }
    if (!same_names(group, PyTuple_GET_ITEM(expected, 2))) return PyLong_FromLong(0);
  }
  return PyLong_FromLong(untouched ? 2 : 1);
}

// read_plain_lrs(groups, numbers): 0 where a learning rate is no float, or not sound, so that Python has to look at them
// one by one; else they are in `numbers`, float64 on the CPU: 1 as they were there before, 2 where any is new.
PyObject* read_plain_lrs(PyObject* const* arguments) {
  static PyObject* const lr = PyUnicode_InternFromString("lr");
  PyObject* groups = arguments[0];
  const auto numbers = memory_of<double>(arguments[1], "numbers");
  if (!(PyList_Check(groups) || PyTuple_Check(groups)) || PySequence_Fast_GET_SIZE(groups) != numbers.room) {
    return PyLong_FromLong(0);
  }
  std::vector<double> now(numbers.room);
  for (Py_ssize_t i = 0; i < numbers.room; i++) {
    PyObject* group = PySequence_Fast_GET_ITEM(groups, i);
    PyObject* value = PyDict_Check(group) ? item(group, lr) : nullptr;
    if (value == nullptr || !PyFloat_CheckExact(value)) return PyLong_FromLong(0);
    now[i] = PyFloat_AS_DOUBLE(value);
    if (!(now[i] >= 0 && std::isfinite(now[i]))) return PyLong_FromLong(0);
  }
  if (std::equal(now.begin(), now.end(), numbers.values)) return PyLong_FromLong(1);
  std::copy(now.begin(), now.end(), numbers.values);
  return PyLong_FromLong(2);
}

// increment_version(tensors): as torch.autograd.graph.increment_version, of a list.
PyObject* increment_version(PyObject* const* arguments) {
  TORCH_CHECK(PyList_Check(arguments[0]), "expected a list of tensors");
  std::vector<PyObject*> objects;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(arguments[0]); i++) objects.push_back(PyList_GET_ITEM(arguments[0], i));
  const auto is_tensor = [](PyObject* object) { return THPVariable_Check(object); };
  TORCH_CHECK(for_each_ahead(objects.data(), objects.data() + objects.size(), is_tensor, touch_object),
              "expected a list of tensors");
  const auto increment = [](PyObject* object) {
    c10::TensorImpl* tensor = THPVariable_Unpack(object).unsafeGetTensorImpl();
    if (!tensor->is_inference()) tensor->bump_version();  // one made in inference mode has no version
    return true;
  };
  Helpers::all(parts_of(objects), [&](size_t part) {
    const auto [begin, end] = range_of(objects, part);
    return for_each_ahead(begin, end, increment, touch_object, touch_outer_of, touch_version_of);
  });
  Py_RETURN_NONE;
}

template <Py_ssize_t count, PyObject* (*function)(PyObject* const*)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&checked<count, function>)), METH_FASTCALL,
          nullptr};
}

PyMethodDef methods[] = {
    method<1, know_dtensors>("know_dtensors"),
    method<1, are_settled>("are_settled"),
    method<5, record>("record"),
    method<4, matches>("matches"),
    method<3, same_groups>("same_groups"),
    method<2, read_plain_lrs>("read_plain_lrs"),
    method<1, increment_version>("increment_version"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "host_walk_compiled", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_host_walk_compiled() { return PyModule_Create(&definition); }
