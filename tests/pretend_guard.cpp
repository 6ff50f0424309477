// Lets autograd run graphs of fake CUDA tensors on a build of PyTorch without CUDA: it asks a device's guard which
// device is current, and the guard of a GPU that isn't there has nothing to switch.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
