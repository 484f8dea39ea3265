// scheduler_step on a CPU: check the tensors, fill the struct, run the kernel over torch's threads. A small step also
// has a way around torch's dispatcher, through DLPack's C exchange table.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "dlpack.h"

namespace difusores {
namespace {

// A team of threads costs more than a small step: so many blocks are about 20 microseconds of one thread.
constexpr int64_t kSmall = 64;
bool is_small(const SchedulerStepArgs& a) { return a.batch * ((a.inner + kStepBlock - 1) / kStepBlock) < kSmall; }

void run_step(const SchedulerStepArgs& a) {
    const int64_t blocks = (a.inner + kStepBlock - 1) / kStepBlock;
    const auto work = [&](int64_t begin, int64_t end) { g_kernels->scheduler_step(a, begin, end); };
    if (is_small(a)) return work(0, a.batch * blocks);
    torch::stable::parallel_for(0, a.batch * blocks, kGrain / kStepBlock, work);
}

void scheduler_step(Tensor row, OptionalTensor step, Tensor sample, Tensor e1, OptionalTensor e2, OptionalTensor e3,
                    OptionalTensor noise, OptionalTensor variance, OptionalTensor threshold, OptionalTensor factor,
                    OptionalTensor s0, OptionalTensor s1, OptionalTensor s2, OptionalTensor s3, OptionalTensor s4,
                    OptionalTensor seeds, OptionalTensor y, OptionalTensor d, OptionalTensor u, OptionalTensor x0,
                    OptionalTensor m) {
    if (sample.numel() == 0) return;
    const OptionalTensor first = e1;
    SchedulerStepArgs a = scheduler_step_args(row, step, sample, {&first, &e2, &e3}, noise, variance, threshold, factor,
                                              {&s0, &s1, &s2, &s3, &s4}, seeds, {&y, &d, &u, &x0, &m});
    a.row = row_on_host(row, step, "scheduler_step");
    for (const OptionalTensor* out : {&y, &d, &u, &x0, &m})
        if (*out) want_huge_pages(**out);
    check_row(a);
    run_step(a);
}

// --- around the dispatcher ---

// Asked for once: DLPack's table of torch.Tensor (nullptr where this torch has none).
const dlpack::ExchangeAPI* g_exchange = nullptr;
PyTypeObject* g_tensor = nullptr;
constexpr int kMostDims = 8;  // of a sample on this way

void find_exchange() {
    const pybind11::module_ torch = pybind11::module_::import("torch");
    const pybind11::object tensor = torch.attr("Tensor");
    if (!pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
    const pybind11::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* table =
        static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw pybind11::error_already_set();
    if (table->major != dlpack::kMajorVersion || !table->dltensor_from_py_object_no_sync ||
        !table->managed_tensor_to_py_object_no_sync)
        return;
    g_tensor = reinterpret_cast<PyTypeObject*>(pybind11::object(tensor).release().ptr());
    g_exchange = table;
}

// Who would miss a call that goes around the dispatcher, told once by difusores/ops/dispatch.py: the variable of the
// backend asked for and the list with that of the environment, which must hold None or "cpu" (an empty list: not looked
// at yet); functions which must answer None, False or 0; the module whose _current_level must be negative.
PyObject *g_wanted = nullptr, *g_environment = nullptr, *g_questions = nullptr, *g_forward_ad = nullptr;

void watch(pybind11::object wanted, pybind11::list environment, pybind11::tuple questions,
           pybind11::module_ forward_ad) {
    g_wanted = wanted.release().ptr(), g_environment = environment.release().ptr();
    g_questions = questions.release().ptr(), g_forward_ad = forward_ad.release().ptr();
}

bool leaves_cpu(PyObject* backend) {
    return backend == Py_None || (PyUnicode_Check(backend) && PyUnicode_CompareWithASCIIString(backend, "cpu") == 0);
}

// Whether nobody watches; errors are left for plain_step to clear.
bool unwatched() {
    static PyObject* const level_name = PyUnicode_InternFromString("_current_level");
    if (!g_wanted || PyList_GET_SIZE(g_environment) == 0 || !leaves_cpu(PyList_GET_ITEM(g_environment, 0)))
        return false;
    PyObject* value = nullptr;
    if (PyContextVar_Get(g_wanted, nullptr, &value) || !value) return false;
    const bool cpu = leaves_cpu(value);
    Py_DECREF(value);
    if (!cpu) return false;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(g_questions); ++k) {
        PyObject* const answer = PyObject_CallNoArgs(PyTuple_GET_ITEM(g_questions, k));
        const bool nobody = answer == Py_None || answer == Py_False || (answer && PyObject_Not(answer) == 1);
        Py_XDECREF(answer);
        if (!nobody) return false;
    }
    PyObject* const level = PyObject_GetAttr(g_forward_ad, level_name);
    const bool none = level && PyLong_Check(level) && PyLong_AsLong(level) < 0;
    Py_XDECREF(level);
    return none;
}

// A plain tensor on the CPU that autograd does not follow, or false.
bool look(PyObject* object, bool records, dlpack::Tensor& t) {
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    if (Py_TYPE(object) != g_tensor) return false;
    if (records) {
        PyObject* const answer = PyObject_GetAttr(object, requires_grad);
        Py_XDECREF(answer);
        if (answer != Py_False) return false;
    }
    return !g_exchange->dltensor_from_py_object_no_sync(object, &t) && t.device_type == dlpack::kCPU && t.ndim >= 1 &&
           t.type_lanes == 1 && t.data;
}

// Whether its numbers are not the negatives of what lies in memory. A view that is negated is the imaginary part of
// complex numbers, whose elements lie two apart: not dense, and not here. Only one element has to be asked, which costs
// as much as all else that is looked at.
bool is_positive(PyObject* object, int64_t elements) {
    if (elements > 1) return true;
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    PyObject* const negative = PyObject_CallMethodNoArgs(object, is_neg);
    Py_XDECREF(negative);
    return negative == Py_False;
}

bool kernel_dtype(const dlpack::Tensor& t, DType& dtype) {
    if (t.type_code == dlpack::kFloat && t.type_bits == 32) dtype = DType::f32;
    else if (t.type_code == dlpack::kFloat && t.type_bits == 16) dtype = DType::f16;
    else if (t.type_code == dlpack::kBfloat && t.type_bits == 16) dtype = DType::bf16;
    else return false;
    return true;
}

void* data(const dlpack::Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// An operand (None: absent) of the sample's shape and per-image strides, or false.
bool look_operand(PyObject* object, bool records, const Shape& sample, int64_t inner, Operand& operand) {
    if (object == Py_None) return true;
    dlpack::Tensor t;
    if (!look(object, records, t) || !kernel_dtype(t, operand.dtype)) return false;
    const Shape shape(t.shape, t.strides, t.ndim);
    if (!shape.same_image(sample) || shape.sizes[0] != sample.sizes[0] || !is_positive(object, inner)) return false;
    operand.ptr = data(t), operand.batch_stride = shape.strides[0];
    return true;
}

// A new tensor of the sample's shape and dtype, images dense and laid out as the sample's, in recycled memory.
struct Output {
    dlpack::ManagedTensor managed;
    int64_t bytes;
    int64_t sizes[kMostDims], strides[kMostDims];
    static void drop(dlpack::ManagedTensor* managed) {
        Output* const self = static_cast<Output*>(managed->manager);
        recycler().give(managed->tensor.data, self->bytes);
        delete self;
    }
};

// The tensor as a Python object and where its elements lie; nullptr with a Python exception set.
PyObject* new_output(const dlpack::Tensor& sample, int64_t inner, void*& data) {
    const int64_t bytes = sample.shape[0] * inner * (sample.type_bits / 8);
    data = recycler().take(bytes);
    if (!data) return PyErr_NoMemory();
    Output* const output = new Output{};
    output->bytes = bytes;
    for (int d = 0; d < sample.ndim; ++d) output->sizes[d] = sample.shape[d], output->strides[d] = sample.strides[d];
    if (sample.shape[0] > 1) output->strides[0] = inner;
    dlpack::ManagedTensor& m = output->managed;
    m.major = dlpack::kMajorVersion, m.manager = output, m.deleter = &Output::drop;
    m.tensor = sample;
    m.tensor.data = data, m.tensor.byte_offset = 0, m.tensor.shape = output->sizes, m.tensor.strides = output->strides;
    void* made = nullptr;
    if (g_exchange->managed_tensor_to_py_object_no_sync(&m, &made)) {
        Output::drop(&m);
        return nullptr;
    }
    return static_cast<PyObject*>(made);
}

// What the slots hold after a step: `places` counts in (*results, sample, noise, *slots).
PyObject* rebound(PyObject* places, PyObject* results, PyObject* sample, PyObject* noise, PyObject* slots) {
    const Py_ssize_t count = PyTuple_GET_SIZE(places), made = PyTuple_GET_SIZE(results);
    PyObject* const held = PyTuple_New(count);
    for (Py_ssize_t k = 0; held && k < count; ++k) {
        const Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GET_ITEM(places, k)), kept = place - made - 2;
        if (place < 0 || kept >= PyTuple_GET_SIZE(slots)) {
            Py_DECREF(held);
            return nullptr;
        }
        PyObject* const t = place < made        ? PyTuple_GET_ITEM(results, place)
                            : place == made     ? sample
                            : place == made + 1 ? noise
                                                : PyTuple_GET_ITEM(slots, kept);
        Py_INCREF(t);
        PyTuple_SET_ITEM(held, k, t);
    }
    return held;
}

// A call on plain tensors of one shape: what the kernel is given but for the row and the outputs.
struct Plain {
    dlpack::Tensor sample;
    SchedulerStepArgs a{};
    // Whether the call is as plain as that and nobody watches: a mode, a transform, a tracer, a profiler.
    bool look_at(PyObject* given, PyObject* model_output, PyObject* noise, PyObject* slots, bool only_f32) {
        if (!g_exchange || model_output == Py_None || !unwatched()) return false;
        const bool records = aoti_torch_grad_mode_is_enabled();
        if (!look(given, records, sample) || !kernel_dtype(sample, a.sample.dtype) ||
            (only_f32 && a.sample.dtype != DType::f32))
            return false;
        const Shape shape(sample.shape, sample.strides, sample.ndim);
        a.batch = shape.sizes[0], a.inner = 1;
        for (int64_t d = 1; d < shape.dim; ++d) a.inner *= shape.sizes[d];
        const Py_ssize_t count = PyTuple_GET_SIZE(slots);
        if (a.batch * a.inner == 0 || !shape.dense_image(a.inner) || count > 5 || shape.dim > kMostDims ||
            (a.batch > 1 && shape.strides[0] < a.inner) || !is_positive(given, a.inner))
            return false;
        a.sample.ptr = data(sample), a.sample.batch_stride = shape.strides[0];
        if (model_output == given) a.e[0] = a.sample;
        else if (!look_operand(model_output, records, shape, a.inner, a.e[0])) return false;
        if (a.e[0].dtype != a.sample.dtype || !look_operand(noise, records, shape, a.inner, a.noise)) return false;
        for (Py_ssize_t k = 0; k < count; ++k)
            if (!look_operand(PyTuple_GET_ITEM(slots, k), records, shape, a.inner, a.slots[k])) return false;
        return true;
    }
    // A new tensor like the sample for an output; nullptr with a Python exception set.
    PyObject* add(Result& result) {
        PyObject* const output = new_output(sample, a.inner, result.ptr);
        if (output) result.dtype = a.sample.dtype, result.repeats = 1;
        return output;
    }
};

// What plain_step and take_stage make: new tensors like sample, one for each of outputs, which number y, d, u, x0, and
// what the slots hold afterwards (see `rebound` for places). Neither where the call is not plain, an exception of the
// kernel's included.
struct Made {
    PyObject* results = nullptr;
    PyObject* slots = nullptr;
};

// A row: 40 float64 in a tensor, or as bytes, which take no call into torch. nullptr: neither.
const double* row_of(PyObject* given) {
    constexpr Py_ssize_t kBytes = 40 * sizeof(double);
    if (PyBytes_CheckExact(given)) {
        const char* const bytes = PyBytes_AS_STRING(given);
        const bool fits =
            PyBytes_GET_SIZE(given) == kBytes && reinterpret_cast<uintptr_t>(bytes) % alignof(double) == 0;
        return fits ? reinterpret_cast<const double*>(bytes) : nullptr;
    }
    dlpack::Tensor row;
    const bool fits = look(given, false, row) && row.type_code == dlpack::kFloat && row.type_bits == 64 &&
                      row.ndim == 1 && row.shape[0] == 40 && row.strides[0] == 1;
    return fits ? static_cast<const double*>(data(row)) : nullptr;
}

Made make(PyObject* given_row, PyObject* given_sample, PyObject* model_output, PyObject* noise, PyObject* given_slots,
          PyObject* given_outputs, PyObject* places, bool only_f32) {
    Plain call;
    if (!call.look_at(given_sample, model_output, noise, given_slots, only_f32)) return {};
    SchedulerStepArgs& a = call.a;
    a.row = row_of(given_row);
    if (!a.row) return {};
    const Py_ssize_t outputs = PyTuple_GET_SIZE(given_outputs);
    PyObject* const made = PyTuple_New(outputs);
    if (!made) return {};
    const auto drop = [&]() -> Made {
        Py_DECREF(made);
        return {};
    };
    Result* const results[4] = {&a.y, &a.d, &a.u, &a.x0};
    for (Py_ssize_t k = 0; k < outputs; ++k) {
        const long place = PyLong_AsLong(PyTuple_GET_ITEM(given_outputs, k));
        PyObject* const output = place < 0 || place > 3 ? nullptr : call.add(*results[place]);
        if (!output) return drop();
        PyTuple_SET_ITEM(made, k, output);
    }
    try {
        check_row(a);
        if (is_small(a)) {
            run_step(a);
        } else {
            const pybind11::gil_scoped_release release;
            run_step(a);
        }
    } catch (const std::exception&) {
        return drop();
    }
    PyObject* const held = rebound(places, made, given_sample, noise, given_slots);
    if (!held) return drop();
    return {made, held};
}

// What went wrong on this way will go wrong, or right, on the general one, which has the words for it.
PyObject* otherwise() {
    PyErr_Clear();
    Py_RETURN_NONE;
}

// plain_step(row, sample, model_output, noise, slots, outputs, places) -> (results, slots afterwards) or None.
PyObject* plain_step(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 7 || !PyTuple_Check(given[4]) || !PyTuple_Check(given[5]) || !PyTuple_Check(given[6])) {
        PyErr_SetString(PyExc_TypeError, "plain_step(row, sample, model_output, noise, slots, outputs, places)");
        return nullptr;
    }
    const Made made = make(given[0], given[1], given[2], given[3], given[4], given[5], given[6], false);
    if (!made.results) return otherwise();
    PyObject* const pair = PyTuple_Pack(2, made.results, made.slots);
    Py_DECREF(made.results);
    Py_DECREF(made.slots);
    return pair;
}

bool is_version(PyObject* tensor, PyObject* version) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    PyObject* const now = PyObject_GetAttr(tensor, name);
    const bool same = now && PyObject_RichCompareBool(now, version, Py_EQ) == 1;
    Py_XDECREF(now);
    return same;
}

// take_stage(run, options, model_output, sample, noise) -> the results that `step` returns or None: the next stage of a
// run of difusores/schedulers/indexed.py, where it is plain and still that of its tables. For a stage that draws noise,
// and none was given: what it draws, and nothing is done.
PyObject* take_stage(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "take_stage(run, options, model_output, sample, noise)");
        return nullptr;
    }
    static PyObject* const names[] = {PyUnicode_InternFromString("index"), PyUnicode_InternFromString("known"),
                                      PyUnicode_InternFromString("slots")};
    // Held, and not borrowed from the run: while a large step runs, another thread may change the run.
    PyObject* const run = given[0];
    pybind11::object held[4];
    for (int k = 0; k < 3; ++k) {
        held[k] = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(run, names[k]));
        if (!held[k]) return otherwise();
    }
    PyObject *const index = held[0].ptr(), *const known = held[1].ptr(), *const slots = held[2].ptr();
    if (!PyLong_Check(index) || !PyTuple_Check(known) || PyTuple_GET_SIZE(known) != 9 || !PyTuple_Check(slots))
        return otherwise();
    // Known of difusores/schedulers/indexed.py
    PyObject *const stages = PyTuple_GET_ITEM(known, 0), *const begin = PyTuple_GET_ITEM(known, 1),
                    *const options = PyTuple_GET_ITEM(known, 2), *const returned = PyTuple_GET_ITEM(known, 7),
                    *const upcast = PyTuple_GET_ITEM(known, 8);
    if (!PyLong_Check(begin) || !PyList_Check(stages) || !PyTuple_Check(returned) ||
        PyObject_RichCompareBool(options, given[1], Py_EQ) != 1 ||
        !is_version(PyTuple_GET_ITEM(known, 3), PyTuple_GET_ITEM(known, 4)) ||
        !is_version(PyTuple_GET_ITEM(known, 5), PyTuple_GET_ITEM(known, 6)))
        return otherwise();
    const Py_ssize_t here = PyLong_AsSsize_t(index), place = here - PyLong_AsSsize_t(begin);
    if (place < 0 || place >= PyList_GET_SIZE(stages)) return otherwise();
    PyObject* const stage = PyList_GET_ITEM(stages, place);
    held[3] = pybind11::reinterpret_borrow<pybind11::object>(stage);
    if (!PyTuple_Check(stage) || PyTuple_GET_SIZE(stage) != 9) return otherwise();
    // CachedStage of difusores/schedulers/base.py
    PyObject *const row = PyTuple_GET_ITEM(stage, 8), *const places = PyTuple_GET_ITEM(stage, 5),
                    *const outputs = PyTuple_GET_ITEM(stage, 7);
    PyObject* const draw = PyTuple_GET_ITEM(stage, 1);
    if (PyTuple_GET_ITEM(stage, 2) != Py_False || PyTuple_GET_ITEM(stage, 3) != Py_None) return otherwise();
    if (draw != Py_None && given[4] == Py_None) {
        Py_INCREF(draw);
        return draw;
    }
    PyObject* const noise = draw == Py_None ? Py_None : given[4];
    const Made made = make(row, given[3], given[2], noise, slots, outputs, places, upcast == Py_True);
    if (!made.results) return otherwise();
    PyObject* const next = PyLong_FromSsize_t(here + 1);
    PyObject* results = nullptr;
    if (next && !PyObject_SetAttr(run, names[2], made.slots) && !PyObject_SetAttr(run, names[0], next))
        results = PyTuple_GetSlice(made.results, 0, PyTuple_GET_SIZE(returned));
    Py_XDECREF(next);
    Py_DECREF(made.results);
    Py_DECREF(made.slots);
    return results;
}

// The mean of the images' norms. fp32, images dense.
double mean_norm(const Operand& t, int64_t batch, int64_t inner) {
    const int64_t blocks = (inner + kStepBlock - 1) / kStepBlock;
    std::vector<double> sums(batch * blocks);
    const auto work = [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kStepBlock;
            const float* const image = static_cast<const float*>(t.ptr) + task / blocks * t.batch_stride;
            sums[task] = g_kernels->sum_of_squares(image + first, std::min(inner - first, kStepBlock));
        }
    };
    if (batch * blocks < kSmall) work(0, batch * blocks);
    else torch::stable::parallel_for(0, batch * blocks, kGrain / kStepBlock, work);
    double norms = 0;
    for (int64_t b = 0; b < batch; ++b)
        norms += std::sqrt(std::accumulate(&sums[b * blocks], &sums[b * blocks] + blocks, 0.0));
    return norms / static_cast<double>(batch);
}

// langevin(score, sample, noise, snr) -> the tensor of difusores/sampling.py's function of that name, or None. Bytes:
// score and noise are read twice, since a norm of all images comes before the step.
PyObject* langevin(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "langevin(score, sample, noise, snr)");
        return nullptr;
    }
    const double snr = PyFloat_AsDouble(given[3]);
    if (snr == -1.0 && PyErr_Occurred()) return otherwise();
    const pybind11::tuple no_slots;
    Plain call;
    SchedulerStepArgs& a = call.a;
    if (given[2] == Py_None || !call.look_at(given[1], given[0], given[2], no_slots.ptr(), true) ||
        a.noise.dtype != DType::f32)
        return otherwise();
    double row[40] = {1.0};
    row[6] = -HUGE_VAL, row[7] = HUGE_VAL, row[12 + 1] = 1.0;  // no limits; xh
    a.row = row;
    PyObject* const made = call.add(a.y);
    if (!made) return otherwise();
    const auto run = [&] {
        const double norm = mean_norm(a.e[0], a.batch, a.inner), ratio = mean_norm(a.noise, a.batch, a.inner) / norm;
        const double step = norm == 0.0 ? 0.0 : 2.0 * (snr * ratio) * (snr * ratio);
        row[12 + 2] = step, row[12 + 3] = std::sqrt(2.0 * step);  // e, z
        run_step(a);
    };
    try {
        if (is_small(a)) {
            run();
        } else {
            const pybind11::gil_scoped_release release;
            run();
        }
    } catch (const std::exception&) {
        Py_DECREF(made);
        return otherwise();
    }
    return made;
}

PyMethodDef g_langevin = {"langevin", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(langevin)),
                          METH_FASTCALL, nullptr};
PyMethodDef g_take_stage = {"take_stage", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(take_stage)),
                            METH_FASTCALL, nullptr};
PyMethodDef g_plain_step = {"plain_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_step)),
                            METH_FASTCALL, nullptr};

}  // namespace

void define_scheduler_step(pybind11::module_& m) {
    find_exchange();
    m.def("watch", &watch);
    m.add_object("langevin", pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&g_langevin, nullptr)));
    m.add_object("take_stage", pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&g_take_stage, nullptr)));
    m.add_object("plain_step", pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&g_plain_step, nullptr)));
}

}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("scheduler_step", TORCH_BOX(&difusores::scheduler_step)); }
